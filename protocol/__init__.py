"""Everything that crosses a process boundary, typed: one place for the words and figures of polydecode."""
