"""The search for layers that stay in float, on made-up models whose best answer brute force finds."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dualtoken_deploy.bundle.blocks import Calibration, SearchResult
from dualtoken_deploy.errors import ToleranceError, UsageError
from dualtoken_deploy.pipeline.check import _doubts
from dualtoken_deploy.quantize import gate
from dualtoken_deploy.quantize.search import HOPELESS, SCORES, Score, ScoreCache, Unit, assigned, search
from dualtoken_deploy.quantize.sensitivity import Sensitivity
from dualtoken_deploy.quantize.sequential import ERROR_RATE, breaks

UNITS = [Unit(name, macs) for name, macs in (
    ("stem.conv1", 10), ("stem.conv2", 15), ("stage1.block1.ffn.fc1", 200), ("stage1.block1.ffn.fc2", 200),
    ("stage1.block1.token.q", 80), ("stage2.block1.ffn.fc1", 300), ("stage2.block1.token.q", 90), ("head.neck", 105),
)]  # fmt: skip
TOTAL = 1010  # ten MACs are never quantized


class Model:
    """Noises that add up; the drop grows with their sum."""

    def __init__(self, noise: dict[str, float], slope: float = 100.0) -> None:
        self.noise, self.slope, self.calls = noise, slope, 0

    def __call__(self, in_float: frozenset[str]) -> Score:
        self.calls += 1
        total = sum(n for name, n in self.noise.items() if name not in in_float)
        return Score(self.slope * total, -10 * math.log10(total) if total else 300.0)

    def sensitivity(self) -> Sensitivity:
        return Sensitivity.independent(self.noise, "known")


def not_asked() -> Sensitivity:
    raise AssertionError("nothing is to be ranked")


def best_by_brute_force(model: Model, budget: float) -> float:
    names = [u.name for u in UNITS]
    shares = []
    for size in range(len(names) + 1):
        for kept in itertools.combinations(names, size):
            if model(frozenset(kept)).drop <= budget:
                shares.append(sum(u.macs for u in UNITS if u.name not in kept) / TOTAL)
    return max(shares)


def noises(seed: int) -> dict[str, float]:
    random = np.random.default_rng(seed)
    return {u.name: float(10 ** random.uniform(-4, -1)) for u in UNITS}


@pytest.mark.parametrize("seed", range(12))
def test_the_answer_is_near_the_best(seed: int) -> None:
    """Within 12 % of the MACs of the best of all 256 assignments, never outside of the budget, for six scores."""
    model = Model(noises(seed))
    found = search(UNITS, model, 1.0, TOTAL, model.sensitivity)
    assert found.met
    assert model.calls <= SCORES
    assert model(frozenset(found.in_float)).drop <= 1.0
    assert found.int8_share >= best_by_brute_force(model, 1.0) - 0.12


@pytest.mark.parametrize("wrong", [0.1, 10.0])
def test_a_prediction_of_the_wrong_size_is_found_out(wrong: float) -> None:
    """First-order noise may be far from what is measured; only its order is relied on."""
    model = Model(noises(1))
    believed = Sensitivity.independent({k: wrong * v for k, v in model.noise.items()}, "wrong")
    found = search(UNITS, model, 1.0, TOTAL, lambda: believed)
    assert found.met
    assert found.int8_share >= best_by_brute_force(model, 1.0) - 0.12


def test_nothing_is_put_back_where_nothing_is_lost() -> None:
    model = Model(dict.fromkeys([u.name for u in UNITS], 1e-6))
    found = search(UNITS, model, 0.5, TOTAL, not_asked)
    assert (found.in_float, found.met, model.calls) == ((), True, 1)
    assert found.int8_share == 1000 / TOTAL


def test_a_noisy_stem_is_found_without_being_named() -> None:
    quiet = dict.fromkeys([u.name for u in UNITS], 1e-4)
    model = Model(quiet | {"stem.conv1": 0.3, "stem.conv2": 0.2})
    found = search(UNITS, model, 0.5, TOTAL, model.sensitivity)
    assert set(found.in_float) == {"stem.conv1", "stem.conv2"}
    assert found.noise["stem.conv1"] == pytest.approx(0.3)
    assert found.trace[0].int8_share > found.int8_share == 975 / TOTAL


def test_what_was_not_needed_goes_back_to_int8() -> None:
    """fc2 is believed to be the worst, and fc1 is what loses: both go to float, and fc2 comes back."""
    noise = dict.fromkeys([u.name for u in UNITS], 1e-5)
    noise |= {"stage1.block1.ffn.fc2": 0.1, "stage1.block1.ffn.fc1": 0.05}

    def scorer(in_float: frozenset[str]) -> Score:
        return Score(5.0 if "stage1.block1.ffn.fc1" not in in_float else 0.1, 10.0)

    found = search(UNITS, scorer, 0.5, TOTAL, lambda: Sensitivity.independent(noise, "misled"))
    assert found.in_float == ("stage1.block1.ffn.fc1",)


def test_a_guess_is_tried_before_others() -> None:
    model = Model(noises(4))
    best = frozenset(search(UNITS, model, 1.0, TOTAL, model.sensitivity).in_float)
    again = Model(noises(4))
    found = search(UNITS, again, 1.0, TOTAL, again.sensitivity, guess=best)
    assert found.trace[1].in_float == tuple(u.name for u in UNITS if u.name in best)
    assert found.met


def test_a_budget_that_cannot_be_met_gives_the_best_seen() -> None:
    def hopeless(in_float: frozenset[str]) -> Score:
        return Score(7.0 - 0.1 * len(in_float), 3.0)

    found = search(UNITS, hopeless, 0.5, TOTAL, Model(noises(0)).sensitivity)
    assert not found.met
    assert found.drop == pytest.approx(7.0 - 0.1 * len(UNITS))
    assert len(found.trace) <= HOPELESS


def test_layers_that_seem_to_do_nothing_go_to_float_in_the_end() -> None:
    """Where what is known of a layer is wrong, and it alone breaks the budget; the search had not come to its end."""
    silent = UNITS[0].name
    noise = {unit.name: 0.0 if unit.name == silent else 0.01 for unit in UNITS}

    def scorer(in_float: frozenset[str]) -> Score:
        return Score(0.0 if silent in in_float else 9.0, 30.0)

    found = search(UNITS, scorer, 0.5, TOTAL, lambda: Sensitivity.independent(noise, "by hand"))
    assert found.met
    assert silent in found.in_float


def test_a_time_limit_stops_with_the_best_seen() -> None:
    found = search(UNITS, Model(noises(0)), 1e-9, TOTAL, not_asked, time_limit_s=0.0)
    assert not found.met
    assert len(found.trace) == 1
    assert found.timed_out


def test_an_assignment_that_is_known_is_scored_once() -> None:
    model = Model(noises(3))
    found = assigned(UNITS, model, 1.0, TOTAL, ("stem.conv2", "head.neck"), lambda _: None)
    assert (model.calls, found.in_float, len(found.trace)) == (1, ("stem.conv2", "head.neck"), 1)
    assert found.int8_share == pytest.approx((TOTAL - 10 - 15 - 105) / TOTAL)
    assert found.drop == pytest.approx(100 * sum(n for k, n in noises(3).items() if k not in found.in_float))
    assert not assigned(UNITS, model, 1e-9, TOTAL, (), lambda _: None).met
    with pytest.raises(UsageError, match=r"^stem\.conv9 is no layer"):
        assigned(UNITS, model, 1.0, TOTAL, ("stem.conv9",), lambda _: None)


def test_a_search_that_came_to_its_end_was_not_timed_out() -> None:
    """Whatever it took: where all fits at once, nothing was left to try."""
    model = Model(noises(3))
    assert search(UNITS, model, 1.0, TOTAL, model.sensitivity, time_limit_s=1e6).timed_out is None
    assert search(UNITS, model, 100.0, TOTAL, not_asked, time_limit_s=0.0).timed_out is None


@pytest.mark.parametrize(("timed_out", "named"), [(True, True), (None, False)])
def test_the_time_limit_is_named_where_it_ended_the_search(
    timed_out: bool | None, named: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And nowhere else, also where the last score took the search past its limit."""
    result = SearchResult((), 7.0, 3.0, 0.5, False, 9.2, timed_out=timed_out)
    monkeypatch.setattr(gate, "_search", lambda *_: result)
    monkeypatch.setattr(gate, "Scorer", lambda *_: None)
    judge: Any = SimpleNamespace(metric="top1")
    nothing: Any = None
    with pytest.raises(ToleranceError) as caught:
        gate.quantize_within_budget(
            "onnxruntime", nothing, nothing, judge, gate.Int8Options("digits", time_limit_s=9), nothing, tmp_path, print
        )
    assert (
        "of top1 within the 9 s of --search-seconds, which ended the search; the best" in str(caught.value)
    ) is named
    assert (": give it more time, raise --max-drop" in str(caught.value)) is named


@pytest.mark.parametrize(("timed_out", "count"), [(True, 1), (None, 0)])
def test_a_bundle_whose_search_was_cut_says_so(timed_out: bool | None, count: int) -> None:
    search = SearchResult(("fc",), 0.2, 20.0, 0.8, True, 9.2, timed_out=timed_out)
    said = Calibration(name="digits", images=10, sha256="", method="minmax", quantizer="", search=search)
    draft: Any = SimpleNamespace(target="onnxruntime", calibration=said)
    found = _doubts(draft)
    assert len(found) == count
    assert all("--search-seconds ended the search after 9.2 s" in text for text in found)


def test_a_search_guesses_at_the_whole_that_is_left() -> None:
    """At most so many more assignments as are tried, and their time by those that were."""
    told: list[str] = []
    model = Model(noises(3))
    found = search(UNITS, model, 1.0, TOTAL, model.sensitivity, told.append)
    tried = [text for text in told if text.startswith("trying ")]
    assert len(tried) == len(found.trace) > 2
    assert tried[0] == "trying all in INT8"
    left = [re.search(r"at most (\d+) more, about \d+ s of the search left at most", text) for text in tried[1:]]
    counts = [int(match[1]) for match in left if match]
    assert len(counts) == len(tried) - 1
    assert counts == sorted(counts, reverse=True)
    assert all(count >= len(found.trace) - number for number, count in enumerate(counts, 1))


def test_an_interrupted_search_goes_on_where_it_was(tmp_path: Path) -> None:
    cache, whole = tmp_path / "deep/scores.json", Model(noises(3))
    expected = search(UNITS, whole, 1.0, TOTAL, whole.sensitivity)
    assert whole.calls > 2

    class Breaks(Model):
        def __call__(self, in_float: frozenset[str]) -> Score:
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().__call__(in_float)

    with pytest.raises(KeyboardInterrupt):
        search(UNITS, Breaks(noises(3)), 1.0, TOTAL, whole.sensitivity, cache=cache)
    again = Model(noises(3))
    found = search(UNITS, again, 1.0, TOTAL, again.sensitivity, cache=cache)
    assert again.calls == whole.calls - 2
    assert found.in_float == expected.in_float


def test_a_damaged_cache_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text('{"full:": {"drop"')
    model = Model(noises(0))
    cache = ScoreCache(model, path)
    cache(frozenset())
    assert model.calls == 1
    assert set(json.loads(path.read_text())) == {"full:"}


# Predictions


def test_errors_add_up_with_their_signs() -> None:
    errors = np.array([[1.0, -2.0], [1.0, 2.0], [0.5, 0.0]])
    known = Sensitivity(("a", "b", "c"), errors, "made up")
    assert known.noise() == pytest.approx((2.5**2 + 0.0) / 2)
    assert known.noise({"c"}) == pytest.approx(4 / 2)  # the two cancel in the second direction
    assert known.noise({"a", "b", "c"}) == 0.0
    assert known.alone() == pytest.approx({"a": 2.5, "b": 2.5, "c": 0.125})


@pytest.mark.parametrize("allowed", [0.5, 0.05, 0.005, 0.0])
def test_a_choice_keeps_to_the_noise_that_is_allowed(allowed: float) -> None:
    random = np.random.default_rng(7)
    known = Sensitivity(tuple(u.name for u in UNITS), random.normal(size=(len(UNITS), 30)) * 0.1, "made up")
    kept = known.choose({u.name: u.macs for u in UNITS}, allowed)
    assert known.noise(kept) <= allowed + 1e-12
    for name in kept:  # none of them could stay in INT8
        assert known.noise(kept - {name}) > allowed


# The sequential test


def draws(losses: np.ndarray[tuple[int], np.dtype[np.float64]], budget: float, runs: int) -> float:
    """In what share of random orders the test says that the budget is broken."""
    random = np.random.default_rng(5)
    found = [breaks(random.permutation(losses).tolist(), len(losses), budget) for _ in range(runs)]
    return float(np.mean([f is not None and f < len(losses) for f in found]))


@pytest.mark.parametrize(("lost", "won"), [(2, 0), (20, 18), (5, 3)])
def test_an_assignment_at_the_budget_is_seldom_given_up(lost: int, won: int) -> None:
    """The worst case that holds: the mean loss is the budget. At most ERROR_RATE of the orders say otherwise."""
    losses = np.array([1.0] * lost + [-1.0] * won + [0.0] * (360 - lost - won))
    assert draws(losses, float(losses.mean()), 400) <= ERROR_RATE + 0.03  # three standard errors of 400 draws


@pytest.mark.parametrize(("share", "within"), [(0.5, 20), (0.2, 60), (0.1, 120)])
def test_a_clear_loss_is_seen_soon(share: float, within: int) -> None:
    losses = np.zeros(360)
    losses[: int(share * 360)] = 1.0
    random = np.random.default_rng(6)
    needed = [breaks(random.permutation(losses).tolist(), 360, 0.005) for _ in range(50)]
    assert all(n is not None for n in needed)
    assert float(np.median([n for n in needed if n is not None])) <= within
