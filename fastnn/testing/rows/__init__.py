"""Families of benchmark rows, one module each: found by `fastnn.testing.bench_cases`."""
