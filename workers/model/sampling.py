"""From logits to the model's own choice at every row.

A draw is the inverse CDF, over the vocabulary in index order, of a number in [0, 1) that is a hash of the request's
seed, the answer's number, the thread's path and the position to be filled. It depends on nothing else, so that a
request draws the same tokens under every method, batch, preemption and worker.
"""

import hashlib
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

GREEDY_BELOW = 1e-5  # temperatures
GREEDY_TOP_P = 1e-8
NUCLEUS = 256  # tokens that nearly always hold the mass of top-p: finding them costs a tenth of sorting all


@dataclass(frozen=True)
class Sampling:
    """How a request chooses tokens. Order: penalties, bias and bans; temperature; top-k; top-p; min-p.

    Attributes:
        top_k: 0 is off. top_p: 1 is off. min_p: 0 is off.
        repetition_penalty: divides positive logits of tokens seen in prompt or answer, multiplies negative ones (CTRL).
        presence_penalty, frequency_penalty: subtracted once, and per occurrence, for tokens of the answer (OpenAI).
        banned: token ids that are never chosen.
        banned_after: for a token id, the ids that must not follow it.
        choice: number of this answer among the request's n.
        processor: changes logits float[vocabulary] after everything above them, given the path's tokens.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    banned: tuple[int, ...] = ()
    banned_after: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    seed: int = 0
    choice: int = 0
    processor: Callable[[list[int], torch.Tensor], torch.Tensor] | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW or self.top_p < GREEDY_TOP_P

    @property
    def adjusts_logits(self) -> bool:
        """Whether logits change before the temperature."""
        return bool(self.logit_bias or self.banned or self.banned_after) or self.uses_history

    @property
    def uses_history(self) -> bool:
        penalised = self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        return penalised or self.processor is not None


@dataclass(frozen=True)
class Row:
    """The place of one row of logits: where its token would stand, and what precedes it.

    Attributes:
        path: the thread's path (fork numbers from the root; the root thread's is empty).
        prompt, answer: the committed tokens of the thread's path.
        drafted: the tree's tokens from the root to this row.
    """

    sampling: Sampling
    path: tuple[int, ...]
    prompt: Sequence[int]
    answer: Sequence[int]
    drafted: Sequence[int] = ()

    @property
    def position(self) -> int:
        return len(self.prompt) + len(self.answer) + len(self.drafted)

    @property
    def previous(self) -> int:
        return (self.drafted or self.answer or self.prompt)[-1]


def choose(logits: torch.Tensor, rows: Sequence[Row]) -> list[int]:
    """The model's token at every row of ``logits`` float[R, vocabulary]: argmax if greedy, else the keyed draw."""
    logits = adjusted(logits, rows)
    tokens = most_probable(logits)
    sampled = [index for index, row in enumerate(rows) if not row.sampling.greedy]
    if sampled:
        drawn = _draw(logits[sampled], [rows[index] for index in sampled])
        for index, token in zip(sampled, drawn, strict=True):
            tokens[index] = token
    return tokens


def typical(
    logits: torch.Tensor, rows: Sequence[Row], tokens: Sequence[int], *, threshold: float, alpha: float
) -> list[float | None]:
    """Log-probability of ``tokens``, each at its row of float[R, vocabulary]; None for those that are not typical.

    Typical (Medusa, Cai et al. 2024) is a probability above min(threshold, alpha · exp(-entropy)), both of the warped
    distribution.
    """
    probabilities = warped(adjusted(logits, rows), [row.sampling for row in rows])
    entropy = torch.special.entr(probabilities).sum(-1)
    own = probabilities.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
    accepted = own > (alpha * torch.exp(-entropy)).clamp(max=threshold)
    return [math.log(value) if yes else None for value, yes in zip(own.tolist(), accepted.tolist(), strict=True)]


def most_probable(logits: torch.Tensor) -> list[int]:
    """The first of the largest logits of each row. On a CPU by numpy, which takes a tenth of torch's time."""
    best: list[int] = (logits.float().numpy() if logits.device.type == "cpu" else logits).argmax(-1).tolist()
    return best


def adjusted(logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """float32[R, vocabulary] with penalties, bias and bans applied; the input itself where no row has any."""
    logits = logits.float()
    changing = [index for index, row in enumerate(rows) if row.sampling.adjusts_logits]
    if changing:
        logits = logits.clone()
        for index in changing:
            _adjust(logits[index], rows[index])
    return logits


def _adjust(logits: torch.Tensor, row: Row) -> None:
    sampling = row.sampling
    if sampling.uses_history:
        _penalise(logits, row)
    if sampling.processor:
        logits.copy_(sampling.processor([*row.prompt, *row.answer, *row.drafted], logits))
    for token, bias in sampling.logit_bias.items():
        logits[token] += bias
    banned = [*sampling.banned, *sampling.banned_after.get(row.previous, ())]
    if banned:
        logits[banned] = -torch.inf


def _penalise(logits: torch.Tensor, row: Row) -> None:
    answer = torch.tensor([*row.answer, *row.drafted], dtype=torch.int64, device=logits.device)
    if row.sampling.repetition_penalty != 1:
        prompt = torch.tensor(row.prompt, dtype=torch.int64, device=logits.device)
        seen = torch.cat([prompt, answer]).unique()
        penalty = row.sampling.repetition_penalty
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    if len(answer):
        tokens, counts = answer.unique(return_counts=True)
        logits[tokens] -= row.sampling.presence_penalty + row.sampling.frequency_penalty * counts


def warped(logits: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """float32[R, vocabulary] probabilities after temperature, top-k, top-p and min-p of each row's sampling."""

    def column(name: str) -> torch.Tensor:
        return torch.tensor([getattr(s, name) for s in samplings], device=logits.device)[:, None]

    scores = logits / column("temperature").float()
    if any(s.top_k for s in samplings):
        scores = _keep_top_k(scores, column("top_k"))
    probabilities = scores.softmax(-1)
    if any(s.top_p < 1 for s in samplings):
        probabilities = _keep_top_p(probabilities, column("top_p"))
    if any(s.min_p for s in samplings):
        floor = probabilities.amax(-1, keepdim=True) * column("min_p")
        probabilities = probabilities.masked_fill(probabilities < floor, 0)
    return probabilities


def _keep_top_k(scores: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    size = scores.shape[-1]
    wanted = torch.where(top_k > 0, top_k, size).clamp(max=size)
    largest = scores.topk(int(wanted[top_k > 0].max()), dim=-1).values
    threshold = largest.gather(-1, (wanted - 1).clamp(max=largest.shape[-1] - 1))
    return scores.masked_fill((scores < threshold) & (wanted < size), -torch.inf)


def _keep_top_p(probabilities: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Keep the smallest set of most probable tokens whose mass reaches ``top_p`` (ties with its last one stay)."""
    few = probabilities.topk(min(NUCLEUS, probabilities.shape[-1]), dim=-1).values
    floor = _nucleus_floor(few, top_p)
    large = ((few.sum(-1) < top_p[:, 0]) & (top_p[:, 0] < 1)).nonzero()[:, 0]
    if len(large):
        ordered = probabilities[large].sort(dim=-1, descending=True).values
        floor[large] = _nucleus_floor(ordered, top_p[large])
    return probabilities.masked_fill((probabilities < floor) & (top_p < 1), 0)


def _nucleus_floor(ordered: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """float[R, 1]: the least of falling probabilities that belongs to the nucleus."""
    before = ordered.cumsum(-1) - ordered
    kept = (before < top_p).sum(-1, keepdim=True).clamp(min=1)
    return ordered.gather(-1, kept - 1)


def _draw(logits: torch.Tensor, rows: Sequence[Row]) -> list[int]:
    cumulative = warped(logits, [row.sampling for row in rows]).double().cumsum(-1)
    numbers = [uniform(row.sampling.seed, row.sampling.choice, row.path, row.position) for row in rows]
    targets = torch.tensor(numbers, dtype=torch.float64, device=logits.device)[:, None] * cumulative[:, -1:]
    # right=True: the first index whose cumulative mass exceeds the target, so never one of mass zero.
    tokens: list[int] = torch.searchsorted(cumulative, targets, right=True)[:, 0].tolist()
    return tokens


def uniform(seed: int, choice: int, path: Sequence[int], position: int) -> float:
    """A number in [0, 1) with 53 random bits, a function of its arguments alone."""
    key = struct.pack(f"<qI{len(path) + 1}I", _wrapped(seed), choice, *path, position)
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def _wrapped(seed: int) -> int:
    """Any integer as a signed 64-bit one."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def top_logprobs(logits: torch.Tensor, tokens: Sequence[int], count: int) -> list["TokenLogprobs"]:
    """Log-probabilities of ``tokens`` (one a row of float[R, vocabulary]) and of the ``count`` best of each row."""
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    best = logprobs.topk(count, dim=-1)
    return [
        TokenLogprobs(own, list(zip(ids, values, strict=True)))
        for own, ids, values in zip(chosen, best.indices.tolist(), best.values.tolist(), strict=True)
    ]


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log-probability of a chosen token, and (id, log-probability) of the most probable ones."""

    logprob: float
    top: list[tuple[int, float]]
