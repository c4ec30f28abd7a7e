"""Collects step traces of whole benchmarks over HTTP, and turns them into figures."""
