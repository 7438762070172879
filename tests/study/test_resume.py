"""What is left to do, from hand-made ledgers."""

from pathlib import Path

import pytest

from study.best import to_confirm, to_judge
from study.ledger import Outcome, Result, Suggestion
from study.loading import parse_spec
from study.measured import collect
from study.resume import next_step, num_planned
from study.steps import AskSampler, Continue, Enqueued, Finished, Start, Wait
from trainables.config import TrialConfig, arm_id, trial_id


def study(
    rest="", trials=6, controls="[random-init]", search="  segment.epochs: {low: 1, high: 99}"
):
    text = f"""\
study: s
data: {{source: smears, size: 64}}
trial: {{model: {{size: pico, patch: 8}}}}
search:
{search}
objectives: [{{metric: segment/miou, goal: maximize}}]
controls: {controls}
budget: {{trials: {trials}}}
{rest}"""
    return parse_spec(text, Path(), where="s.yaml")


class Books:
    """A ledger in memory, and a driver that does what it is told."""

    def __init__(self, spec):
        self.spec, self.suggestions, self.results, self.rows = spec, [], {}, []
        self.running, self.is_exhausted, self.is_labelled = set(), False, True

    def next(self):
        return next_step(
            self.spec, self.suggestions, self.results, self.running, collect(self.rows),
            is_labelled=self.is_labelled, is_exhausted=self.is_exhausted,
        )  # fmt: skip

    def begin(self, step):
        if isinstance(step, Continue):
            self.running.add(step.suggestion.trial)
            return step.suggestion
        if isinstance(step, AskSampler):
            segment = self.spec.trial.segment.model_copy(update={"epochs": 30 + step.number})
            config = self.spec.trial.model_copy(update={"segment": segment})
            step = Start("search", config, step.seed, {"segment.epochs": 30 + step.number}, {})
        one = Suggestion(
            len(self.suggestions), trial_id(step.config, step.seed, "data"), arm_id(step.config),
            step.seed, step.origin, step.config.model_dump(mode="json"), step.params, step.labels,
        )  # fmt: skip
        assert one.trial not in {other.trial for other in self.suggestions}
        self.suggestions.append(one)
        self.running.add(one.trial)
        return one

    def end(self, one, value=0.5, outcome=Outcome.COMPLETE, error=None, failures=0):
        self.running.discard(one.trial)
        self.results[one.trial] = Result(one.trial, outcome, 1.0, error, {}, failures)
        if outcome is Outcome.COMPLETE:
            self.rows.append(
                {"trial": one.trial, "phase": "segment", "metric": "miou", "progress": 1.0,
                 "value": value}
            )  # fmt: skip

    def run(self, value=lambda one: 0.5):
        while not isinstance(step := self.next(), Finished):
            one = self.begin(step)
            self.end(one, value(one))
        return [(one.origin, one.seed) for one in self.suggestions]


def test_controls_come_first_then_the_search_until_the_budget_is_spent():
    assert Books(study()).run() == [
        ("control", 0), ("control:random-init", 0), *[("search", 0)] * 4,
    ]  # fmt: skip


def test_every_arm_gets_all_its_seeds_before_the_next_one():
    books = Books(study("seeds: 2\nseed: 7\n", trials=8))
    assert books.run() == [
        ("control", 7), ("control", 8), ("control:random-init", 7), ("control:random-init", 8),
        *[("search", 7), ("search", 8)] * 2,
    ]  # fmt: skip
    arms = [one.arm for one in books.suggestions]
    assert arms[0::2] == arms[1::2]
    assert [one.params for one in books.suggestions[4:]] == [
        {"segment.epochs": 34}, {"segment.epochs": 34},
        {"segment.epochs": 36}, {"segment.epochs": 36},
    ]  # fmt: skip


def test_a_study_without_search_runs_its_controls():
    books = Books(study(search="  {}", controls="[random-init, frozen]", trials=100))
    assert [origin for origin, _ in books.run()] == [
        "control", "control:random-init", "control:frozen",
    ]  # fmt: skip
    encoders = [one.config["segment"]["encoder"] for one in books.suggestions]
    assert encoders == ["finetune", "random-init", "frozen"]


def test_without_labels_there_are_no_twins():
    books = Books(study(trials=3))
    books.is_labelled = False
    assert [origin for origin, _ in books.run()] == ["control", "search", "search"]


def test_a_twin_that_is_the_control_is_run_once():
    spec = study("", trials=3)
    frozen = spec.trial.segment.model_copy(update={"encoder": "frozen"})
    spec = spec.model_copy(
        update={"trial": spec.trial.model_copy(update={"segment": frozen}), "controls": ["frozen"]}
    )
    assert [origin for origin, _ in Books(spec).run()] == ["control", "search", "search"]


def test_what_was_begun_goes_on_before_anything_new_starts():
    books = Books(study())
    first, second = books.begin(books.next()), books.begin(books.next())
    books.running.clear()  # the driver was killed
    assert books.next() == Continue(first)
    books.running.add(first.trial)
    assert books.next() == Continue(second)
    books.end(first)
    assert books.next() == Continue(second)


def test_a_failure_of_the_infrastructure_is_tried_three_times_more():
    books = Books(study(trials=2))
    one = books.begin(books.next())
    for failures in (1, 2, 3):
        books.end(one, outcome=Outcome.FAILED, error="node lost", failures=failures)
        assert books.next() == Continue(one)
        books.begin(Continue(one))
    books.end(one, outcome=Outcome.FAILED, error="node lost", failures=4)
    assert books.next().origin == "control:random-init"


def test_a_failure_of_the_trial_itself_is_not_tried_again():
    books = Books(study())
    books.end(
        books.begin(books.next()),
        outcome=Outcome.FAILED,
        error="infrastructure of mine is at fault",
    )
    assert books.next().origin == "control:random-init"


@pytest.mark.parametrize("outcome", [Outcome.STOPPED, Outcome.DIVERGED, Outcome.OUT_OF_MEMORY])
def test_an_arm_of_which_a_seed_was_stopped_gets_no_further_seeds(outcome):
    books = Books(study("seeds: 2\n", trials=8, controls="[]"))
    for _ in range(2):
        books.end(books.begin(books.next()))
    books.end(books.begin(books.next()), outcome=outcome)
    assert isinstance(books.next(), AskSampler)
    seeds = [seed for _, seed in books.run()]
    assert seeds == [0, 1, 0, 0, 1, 0, 1, 0]  # still 8 trials


def test_a_seed_that_was_begun_goes_on_although_another_was_stopped():
    books = Books(study("seeds: 2\n", trials=4, controls="[]"))
    for _ in range(2):
        books.end(books.begin(books.next()))
    one, other = books.begin(books.next()), books.begin(books.next())
    books.end(one, outcome=Outcome.STOPPED)
    books.running.clear()
    assert books.next() == Continue(other)


CONFIRM = "confirm: {arms: 2, seeds: 2}\n"


def test_the_best_arms_and_the_control_are_confirmed_with_fresh_seeds():
    books = Books(study(CONFIRM, trials=6))
    scores = {32: 0.5, 33: 0.8, 34: 0.6, 35: 0.7}
    order = books.run(lambda one: scores.get(one.config["segment"]["epochs"], 0.1))
    assert order[6:] == [("confirm", 1), ("confirm", 2)] * 3
    epochs = [one.config["segment"]["epochs"] for one in books.suggestions[6:]]
    assert epochs == [33, 33, 35, 35, 20, 20]


def test_the_smallest_is_best_where_the_goal_says_so():
    spec = study(CONFIRM, trials=4)
    books = Books(spec)
    books.run(lambda one: {32: 5.0, 33: 3.0}.get(one.config["segment"]["epochs"], 0.0))
    objective = spec.objectives[0].model_copy(update={"goal": "minimize"})
    turned = spec.model_copy(update={"objectives": [objective]})
    best = [books.suggestions[index].arm for index in (2, 3)]
    assert to_confirm(spec, books.suggestions, books.results, collect(books.rows)) == best
    assert to_confirm(turned, books.suggestions, books.results, collect(books.rows)) == best[::-1]


def test_only_arms_whose_seeds_are_all_complete_and_finite_can_be_best():
    books = Books(study("seeds: 2\n" + CONFIRM, trials=8, controls="[]"))
    values = iter([0.1, 0.1, 0.9, float("nan"), 0.2, 0.4, 0.3, 0.2])
    while not isinstance(books.next(), Finished) and len(books.suggestions) < 8:
        books.end(books.begin(books.next()), next(values))
    best = to_confirm(books.spec, books.suggestions, books.results, collect(books.rows))
    assert best == [books.suggestions[4].arm, books.suggestions[6].arm]


def test_confirmation_waits_for_all_others():
    books = Books(study(CONFIRM, trials=3))
    ones = [books.begin(books.next()) for _ in range(3)]
    assert books.next() == Wait()
    books.end(ones[0])
    books.end(ones[2])
    assert books.next() == Wait()
    books.end(ones[1])
    assert books.next().origin == "confirm"


def test_a_running_study_waits_and_a_done_one_is_finished():
    books = Books(study(trials=2))
    ones = [books.begin(books.next()) for _ in range(2)]
    assert books.next() == Wait()
    for one in ones:
        books.end(one)
    assert books.next() == Finished()


def test_an_exhausted_space_ends_the_search_before_the_budget():
    books = Books(study(CONFIRM))
    for _ in range(3):
        books.end(books.begin(books.next()))
    assert isinstance(books.next(), AskSampler)
    books.is_exhausted = True
    assert books.next().origin == "confirm"


def test_a_larger_budget_goes_on_where_the_smaller_one_ended():
    books = Books(study(CONFIRM, trials=4))
    before = books.run()
    books.spec = study(CONFIRM, trials=6)
    assert isinstance(books.next(), AskSampler)
    after = books.run(lambda one: 0.9)
    assert after[: len(before)] == before
    assert [origin for origin, _ in after].count("search") == 4
    assert [origin for origin, _ in after].count("confirm") == 10  # two new best arms, 2 seeds


VERDICT = "confirm: {arms: 2, seeds: 2, verdict: 3}\n"


def test_the_best_of_the_confirmed_and_the_controls_get_the_seeds_of_the_verdict():
    books = Books(study(VERDICT, trials=6, controls="[random-init, frozen]"))
    # 34 is chosen by one lucky seed; of the mean of all three, .7 and .8, 33 is the best
    scores = {32: [0.6], 33: [0.8, 0.8, 0.8], 34: [0.9, 0.6, 0.6], 35: [0.7]}

    def score(one):
        values = scores.get(one.config["segment"]["epochs"], [0.1])
        return values[min(one.seed, len(values) - 1)]

    order = books.run(score)
    assert order[6:10] == [("confirm", 1), ("confirm", 2)] * 2
    # far from those to confirm, of which there may be more one day; all arms of a seed together
    assert order[10:] == [("verdict", seed) for seed in (1001, 1002, 1003) for _ in range(4)]
    epochs = [one.config["segment"]["epochs"] for one in books.suggestions[6:]]
    assert epochs == [34, 34, 33, 33] + [33, 20, 20, 20] * 3
    encoders = [one.config["segment"]["encoder"] for one in books.suggestions[11:14]]
    assert encoders == ["finetune", "random-init", "frozen"]
    assert num_planned(books.spec) == len(order)


def test_a_verdict_waits_for_all_that_is_confirmed_and_does_not_change_its_winner():
    books = Books(study(VERDICT, trials=4))
    for _ in range(4):
        books.end(books.begin(books.next()))
    ones = [books.begin(books.next()) for _ in range(4)]
    assert books.next() == Wait()
    for one, value in zip(ones, (0.5, 0.6, 0.7, 0.1), strict=True):
        books.end(one, value)
    judged = [books.spec, books.suggestions, books.results]
    assert to_judge(*judged, collect(books.rows)) == ones[0].arm
    books.run(lambda one: -1.0)  # however its verdict turns out
    assert to_judge(*judged, collect(books.rows)) == ones[0].arm
    assert {one.arm for one in books.suggestions if one.origin == "verdict"} == {
        ones[0].arm, books.suggestions[0].arm, books.suggestions[1].arm,
    }  # fmt: skip


def test_where_nothing_could_be_confirmed_nothing_is_judged():
    books = Books(study(VERDICT, trials=3))
    while not isinstance(step := books.next(), Finished):
        one = books.begin(step)
        books.end(one, outcome=Outcome.DIVERGED if one.origin == "search" else Outcome.COMPLETE)
    assert [one.origin for one in books.suggestions] == ["control", "control:random-init", "search"]
    alone = Books(study(VERDICT, search="  {}", trials=2))
    assert num_planned(alone.spec) == len(alone.run())


def test_an_arm_of_which_a_seed_has_failed_is_judged_where_no_other_has_more():
    books = Books(study(VERDICT, trials=4))
    for _ in range(4):
        books.end(books.begin(books.next()))
    fresh = [books.begin(books.next()) for _ in range(4)]
    for one, value in zip(fresh, (0.9, 0.1, 0.5, 0.5), strict=True):
        books.end(one, value, outcome=Outcome.COMPLETE if one.seed == 1 else Outcome.DIVERGED)
    assert books.next().origin == "verdict"
    assert books.begin(books.next()).arm == fresh[0].arm


@pytest.mark.parametrize("rule", [CONFIRM, VERDICT])
@pytest.mark.parametrize("kill_at", range(1, 14))
def test_a_study_killed_at_any_trial_runs_the_same_trials(kill_at, rule):
    whole = Books(study("seeds: 2\n" + rule, trials=8))
    expected = whole.run()
    books = Books(whole.spec)
    for _ in range(kill_at):
        step = books.next()
        if isinstance(step, Finished):
            break
        one = books.begin(step)
        if len(books.suggestions) < kill_at:
            books.end(one)
    books.running.clear()
    assert books.run() == expected
    assert [one.trial for one in books.suggestions] == [one.trial for one in whole.suggestions]


def test_configurations_survive_the_ledger():
    books = Books(study("seeds: 2\n", trials=4, controls="[]"))
    books.run()
    for one in books.suggestions:
        assert arm_id(TrialConfig.model_validate(one.config)) == one.arm


SCOUTS = "seeds: 3\nstopping: halving\n"


def test_where_arms_may_be_stopped_the_first_seed_runs_alone():
    books = Books(study(SCOUTS, trials=100, controls="[]"))
    for _ in range(3):
        books.begin(books.next())  # the control
    first = books.begin(books.next())
    other = books.begin(books.next())
    assert (first.seed, other.seed) == (0, 0) and first.arm != other.arm
    books.end(first, outcome=Outcome.STOPPED)
    assert isinstance(books.next(), AskSampler)
    books.end(other)
    seeds = [books.begin(books.next()) for _ in range(3)]
    assert [(each.arm, each.seed) for each in seeds[:2]] == [(other.arm, 1), (other.arm, 2)]
    assert seeds[2].arm not in (first.arm, other.arm)


def test_the_budget_keeps_room_for_the_seeds_of_arms_that_may_go_on():
    books = Books(study(SCOUTS, trials=10, controls="[]"))
    for _ in range(3):
        books.end(books.begin(books.next()))
    one, two, three = (books.begin(books.next()) for _ in range(3))  # room for seven trials
    assert isinstance(books.next(), Wait)
    books.end(one, outcome=Outcome.STOPPED)
    assert isinstance(books.next(), Wait)  # two and three may need six of them
    books.end(two)
    books.end(three, outcome=Outcome.STOPPED)
    books.run()
    assert len(books.suggestions) == 10
    seeds = [sum(each.arm == arm.arm for each in books.suggestions) for arm in (one, two, three)]
    assert seeds == [1, 3, 1]


def test_arms_that_a_person_asked_for_run_all_seeds_at_once():
    books = Books(study(SCOUTS, trials=100, controls="[]"))
    for _ in range(3):
        books.begin(books.next())
    config = books.spec.trial.model_copy(
        update={"segment": books.spec.trial.segment.model_copy(update={"epochs": 33})}
    )
    asked = [Enqueued(config, {"segment.epochs": 33}, {"segment.epochs": 33})]
    arms = []
    for _ in range(3):
        step = next_step(
            books.spec, books.suggestions, books.results, books.running, {}, enqueued=asked
        )
        arms.append((arm_id(step.config), step.seed))
        books.begin(step)
    assert arms == [(arm_id(config), seed) for seed in range(3)]
