import pytest


pytest.importorskip("fastapi")
benchmark = pytest.importorskip("serving")


@pytest.mark.slow
def test_the_load_benchmark_loses_and_swaps_no_answer(tmp_path):
    args = benchmark.ServingArguments(
        clients=[1, 6], requests=2, questions=8, entities=6, repeats=1, output=str(tmp_path / "figures.json")
    )
    figures = benchmark.run(args)
    assert [(row["clients"], row["answers"], row["lost"], row["wrong"]) for row in figures["rows"]] == [
        *[(1, 2, 0, 0)] * 2,
        *[(6, 12, 0, 0)] * 2,
    ]
    assert "micro-batches | 6" in benchmark.table(figures) and (tmp_path / "figures.json").exists()
