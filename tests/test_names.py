"""experiments/names: on the toy itself, an adapter of planted features has no other names."""

from experiments import names


def test_names_are_what_was_planted_and_nothing_else():
    found = names.measure(names.Bench(), "planted", 0)
    assert {tuple(name) for name in found["named"]} <= {tuple(name) for name in found["planted"]}
    assert found["named"] and found["something"] and found["main"] == found["planted"]
