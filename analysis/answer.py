"""The answer to the study's question, in sentences, and how sure it is."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any, NamedTuple

import pandas as pd

from analysis.figures import labels
from analysis.figures.differences import differences_numbers, p_words, values_by_seed
from analysis.figures.ranking import best_arm, ranking_numbers
from analysis.statistics import FEWEST_SEEDS, LEVEL, detectable_difference, difference
from analysis.tables import (
    OUTCOMES,
    Measure,
    StudyTables,
    arm_scores,
    by_size,
    trivial_scores,
)
from study.best import Stage
from study.gain import best_gain, in_words, warning
from trainables.metrics import MIOU, on_test

SOLVED_SHARE = 0.95  # of the control's mIoU: a segmenter without an encoder all but does its work


class Answer(NamedTuple):
    """`is_shown`: the headline tells of a difference that is shown beyond chance."""

    headline: str
    sentences: list[str]
    is_shown: bool


def answer(tables: StudyTables) -> Answer:
    """What the data say to the question, and how sure that is."""
    ranks = ranking_numbers(tables)
    best = best_arm(ranks)
    if best is None:
        return Answer(
            "No answer yet: no trial is complete.", [_progress_sentence(tables)], is_shown=False
        )
    goal = tables.objectives[0]
    by_labels = labels.labels_numbers(tables)
    if by_labels["labels"].nunique() > 1:  # arms that learnt from more labels are no better arms
        told = [labels.worth(by_labels, goal), _gain_sentence(tables), _trivial_sentence(tables)]
        told += [_dense_sentence(tables), _progress_sentence(tables)]
        is_shown = bool(labels.is_shown(by_labels).any())
        return Answer(labels.headline(by_labels, goal), [each for each in told if each], is_shown)
    against = differences_numbers(tables)
    line = ranks[ranks["arm"] == best].iloc[0]
    control = ranks[ranks["group"] == "control"]
    sentences: list[str | None] = []
    if line["group"] == "control":
        score = f"{goal.title} {goal.show(line['mean'])}"
        headline = f"Only controls are complete so far ({line['label']}; {score})."
        is_shown = False
    elif control.empty:
        bound = "Highest" if goal.maximize else "Lowest"
        headline = f"{bound} {goal.title} so far: {line['label']} ({goal.show(line['mean'])})."
        sentences.append("The control is not complete, so there is nothing to compare it with yet.")
        is_shown = False
    else:
        verdict = against[against["arm"] == best].iloc[0]
        is_shown = is_beyond_chance(verdict) and (verdict["mean"] > 0) == goal.maximize
        headline = _beside_the_control(line, control.iloc[0], verdict, goal, is_shown)
        sentences.append(_certainty(verdict, goal, tables))
        effect = _effect_of_pretraining(against, goal)
        if not is_shown and effect:
            sentences.insert(0, headline)
            headline = (
                f"Pretraining {effect}; the best arm is not shown to be better than the control."
            )
            is_shown = True
    sentences += [_gain_sentence(tables), _trivial_sentence(tables)]
    sentences.append(_comparability_sentence(tables))
    sentences.append(_random_weights_sentence(tables, ranks, goal))
    sentences += [_pretraining_sentence(ranks, against, goal), _dense_sentence(tables)]
    sentences.append(_test_sentence(tables, best, goal))
    sentences += [_by_patch_sentence(tables, goal), _other_objectives(tables, ranks)]
    sentences.append(_progress_sentence(tables))
    return Answer(headline, [sentence for sentence in sentences if sentence], is_shown)


def is_beyond_chance(verdict: Any) -> bool:
    """Enough seeds, an interval that leaves out 0, and p still small after Holm's adjustment."""
    return bool(
        verdict["n"] >= FEWEST_SEEDS
        and (verdict["low"] > 0 or verdict["high"] < 0)
        and verdict["p_holm"] < LEVEL
    )


def _beside_the_control(
    best: pd.Series, control: pd.Series, verdict: pd.Series, goal: Measure, is_shown: bool
) -> str:
    """The best searched arm and the control, lines of the ranking, in one sentence."""
    own, others = goal.show(best["mean"]), goal.show(control["mean"])
    if not is_shown and own == others:  # as far as the digits that mean something tell
        return (
            f"No searched arm is ahead of the control: the best ({best['label']}) is level with it "
            f"at {goal.title} {own}."
        )
    if not is_shown and not _is_ahead(best, control, goal):
        return (
            f"No searched arm is ahead of the control: {goal.title} {others} against {own} of the "
            f"best ({best['label']})."
        )
    lead = "Best arm" if is_shown else "Ahead, but not shown to be better"
    if verdict["n"] < 2:
        lead = "Ahead, on one seed"
    return f"{lead}: {best['label']}; {goal.title} {own} against {others} of the control."


def _is_ahead(one: pd.Series, other: pd.Series, goal: Measure) -> bool:
    """Whether an arm's mean is better than another's; arms are lines of the ranking."""
    gap = one["mean"] - other["mean"]
    return bool(gap > 0 if goal.maximize else gap < 0)


def _certainty(verdict: Any, goal: Measure, tables: StudyTables) -> str:
    gap = goal.show(verdict["mean"], signed=True)
    if verdict["n"] < 2 and tables.last_stage is not Stage.SEARCH:
        return (
            f"One seed: no interval. The difference ({gap}) may be chance; the study's claims rest "
            f"on fresh seeds, of which too few have ended well."
        )
    if verdict["n"] < 2:
        return (
            f"One seed: no interval. The difference ({gap}) may be chance, and the best of many "
            f"single runs looks better than it is. To know, run the study with "
            f"`confirm: {{arms: 3, seeds: 2, verdict: 10}}` or with `seeds: 3` and more."
        )
    interval = f"{gap}, 95 % interval {goal.show(verdict['low'], signed=True)} to "
    interval += goal.show(verdict["high"], signed=True)
    how = f"{verdict['n']} {'seeds, paired' if verdict['paired'] else 'seeds or more, unpaired'}"
    if math.isnan(verdict["p_holm"]):
        return (
            f"The difference is {interval} ({how}). Nothing is claimed of it: the study's claims "
            f"rest on fresh seeds, and not all of them have ended."
        )
    fresh, last = "", tables.last_stage
    if last is not Stage.SEARCH:
        fresh = " on fresh seeds, without the trials that made the arm stand out"
        found = [one for one in tables.standings(goal) if one.group == "search"]
        if sum(one.stage is last for one in found) > 1:
            fresh += "; it is the best of several on these seeds, so expect somewhat less on others"
        elif last is Stage.VERDICT:
            fresh = " on fresh seeds, by which nothing was chosen"
    elif len(tables.arms) > 2:
        fresh = "; the same seeds chose the arm among many, so expect somewhat less on new ones"
    if is_beyond_chance(verdict):
        return (
            f"The difference is {interval} ({how}; {p_words(verdict['p_holm'])} after Holm's "
            f"adjustment){fresh}."
        )
    if verdict["n"] < FEWEST_SEEDS:
        return (
            f"The difference is {interval} ({how}). Two seeds are too few for a claim; "
            f"take {FEWEST_SEEDS} or more."
        )
    if verdict["low"] > 0 or verdict["high"] < 0:
        return (
            f"The difference is {interval} ({how}); alone it would count, but after Holm's "
            f"adjustment for all arms compared {p_words(verdict['p_holm'])}: not shown."
        )
    least = detectable_difference(verdict["sd"], int(verdict["n"])) if verdict["paired"] else None
    missed = (
        f" With this noise {verdict['n']} seeds show a difference of {goal.show(least)} or more "
        f"in four of five studies; a smaller one needs more seeds."
        if least
        else ""
    )
    return f"The difference is {interval} ({how}): not told apart from none.{missed}"


def _trivial_sentence(tables: StudyTables) -> str | None:
    """Told only where a segmenter without an encoder comes close to the arms, whoever is asked for.

    That is: at SOLVED_SHARE of the control's mIoU, or level with the highest of all arms.
    """
    trivial = trivial_scores(tables)
    means = arm_scores(tables, MIOU).groupby("arm")["value"].mean()
    if not trivial or means.empty:
        return None
    measure, value = trivial[0]
    miou, highest = tables.measure(MIOU), float(means.max())
    control = [means[arm] for arm in means.index if tables.arms.at[arm, "group"] == "control"]
    own, others = miou.show(value), miou.show(highest)
    if own == others or value > highest:
        words = f"is {'level with' if own == others else 'ahead of'} the best arm"
        return (
            f"A segmenter without an encoder {words}: {measure.title} {own}, "
            f"{tables.label(str(means.idxmax()))} {others}. Such data cannot tell encoders apart."
        )
    if control and value >= SOLVED_SHARE * control[0]:
        return (
            f"A segmenter without an encoder comes close: {measure.title} {own} against mIoU "
            f"{miou.show(control[0])} of the control. Such data hardly tell encoders apart."
        )
    return None


def _gain_sentence(tables: StudyTables) -> str | None:
    """Whether any encoder has learnt more than trivial fillings know."""
    leader = best_gain(tables.gains)
    if leader is None:
        return None
    trial, gain = leader
    return warning(gain) or (
        f"Hidden pixels are filled in best by an encoder of {tables.label(tables.arm_of(trial))}: "
        f"{in_words(gain)}, which needs no learning."
    )


def _comparability_sentence(tables: StudyTables) -> str | None:
    """Told only where the study asks for metrics that not all arms share."""
    titles = [measure.title for measure in tables.objectives if not measure.is_comparable]
    if not titles:
        return None
    return (
        f"Arms that differ in ratio or patch cannot be compared by {' or '.join(titles)}: it "
        f"depends on the trial's own ratio and patch."
    )


def _random_weights_sentence(tables: StudyTables, ranks: pd.DataFrame, goal: Measure) -> str | None:
    """Told only where they are ahead of the best searched arm."""
    searched, scratch = ranks[ranks["group"] == "search"], ranks[ranks["group"] == "random-init"]
    if searched.empty or scratch.empty:
        return None
    best, bare = searched.iloc[0], scratch.iloc[0]
    if not _is_ahead(bare, best, goal):
        return None
    own, others = goal.show(bare["mean"]), goal.show(best["mean"])
    words = (
        f"Random weights, without any pretraining, are "
        f"{'level with' if own == others else 'ahead of'} the best searched arm "
        f"({best['label']}): {goal.title} {own} against {others}"
    )
    values = values_by_seed(tables, goal.key)
    found = difference(values[bare["arm"]], values[best["arm"]])
    if found is None:
        return f"{words}; one seed, so no interval."
    words += (
        f"; difference {goal.show(found.mean, signed=True)}, 95 % interval "
        f"{goal.show(found.low, signed=True)} to {goal.show(found.high, signed=True)}, "
        f"{found.n} seeds"
    )
    is_shown = found.n >= FEWEST_SEEDS and (found.low > 0 or found.high < 0)
    return f"{words}." if is_shown else f"{words}: not told apart from none."


def _effect_of_pretraining(against: pd.DataFrame, goal: Measure) -> str | None:
    """What is shown of the control's: "helps", "hurts"; None: nothing."""
    scratch = against[against["group"] == "random-init"]
    if scratch.empty or not is_beyond_chance(scratch.iloc[0]):
        return None
    return "helps" if (scratch.iloc[0]["mean"] < 0) == goal.maximize else "hurts"


def _pretraining_sentence(ranks: pd.DataFrame, against: pd.DataFrame, goal: Measure) -> str | None:
    """The control against the same network from random weights."""
    scratch = against[against["group"] == "random-init"]
    if scratch.empty:
        return None
    verdict = scratch.iloc[0]
    control = ranks.loc[ranks["group"] == "control", "mean"].iloc[0]
    bare = ranks.loc[ranks["group"] == "random-init", "mean"].iloc[0]
    values = f"{goal.show(control)} with it, {goal.show(bare)} from random weights"
    if verdict["n"] < 2:
        return f"Pretraining (control's settings): {values}; one seed, so no interval."
    low, high = sorted([-verdict["high"], -verdict["low"]])
    interval = (
        f"difference {goal.show(-verdict['mean'], signed=True)}, 95 % interval "
        f"{goal.show(low, signed=True)} to {goal.show(high, signed=True)}, {verdict['n']} seeds"
    )
    effect = _effect_of_pretraining(against, goal)
    if math.isnan(verdict["p_holm"]):
        return (
            f"Pretraining (control's settings): {values}; {interval}: not tested, as the study's "
            f"claims rest on fresh seeds, and not all of them have ended."
        )
    if effect is None:
        return f"Pretraining (control's settings): {values}; {interval}: no effect shown."
    return f"Pretraining {effect} (control's settings): {values}; {interval}."


def _dense_sentence(tables: StudyTables) -> str | None:
    """The control's frozen encoder against its random start and against raw pixels."""
    groups = tables.arms["group"]
    control = next((str(arm) for arm in groups.index[groups == "control"]), "")
    names = ("pretrain/dense_miou", "pretrain/dense_miou_random", "pretrain/dense_miou_pixels")
    by_seed = [values_by_seed(tables, name).get(control, {}) for name in names]
    if not all(by_seed):
        return None
    measure = tables.measure(names[0])
    trained, start, pixels = (fmean(values.values()) for values in by_seed)
    words = (
        f"Before fine-tuning (control's settings, frozen): {measure.title} "
        f"{measure.show(trained)}, {measure.show(start)} at the random start, "
        f"{measure.show(pixels)} of raw pixels"
    )
    found = difference(by_seed[0], by_seed[1])
    if found is None:
        gap = measure.show(trained - start, signed=True)
        return f"{words}; pretraining {gap}, one seed, so no interval."
    return (
        f"{words}; pretraining {measure.show(found.mean, signed=True)}, 95 % interval "
        f"{measure.show(found.low, signed=True)} to {measure.show(found.high, signed=True)}, "
        f"{found.n} seeds."
    )


def _test_sentence(tables: StudyTables, best: str, goal: Measure) -> str | None:
    """The test split, on which nothing was chosen."""
    scores = arm_scores(tables, on_test(goal.key)).groupby("arm")["value"].mean()
    if best not in scores.index:
        return None
    control = [arm for arm in scores.index if tables.arms.at[arm, "group"] == "control"]
    words = f"On the test images, on which nothing was chosen: {goal.show(scores[best])}"
    if control and control[0] != best:
        words += f" against {goal.show(scores[control[0]])} of the control"
    return words + "."


def _by_patch_sentence(tables: StudyTables, goal: Measure) -> str | None:
    scores = arm_scores(tables, goal.key)
    searched = tables.arms["group"].isin(["search", "control"])
    scores = scores[scores["arm"].isin(tables.arms.index[searched])]
    patches = by_size(scores["arm"].map(tables.arms["patch"]))
    groups = scores.groupby(patches, observed=True)["value"]
    if groups.ngroups < 2:
        return None
    parts = [
        f"patch {patch} {goal.show(values.mean())} (n = {len(values)})" for patch, values in groups
    ]
    return f"Mean {goal.title} by patch size, other settings mixed: {', '.join(parts)}."


def _other_objectives(tables: StudyTables, ranks: pd.DataFrame) -> str | None:
    parts = []
    candidates = ranks.loc[ranks["group"].isin(["search", "control"]), "arm"]
    for measure in tables.objectives[1:]:
        means = arm_scores(tables, measure.key).groupby("arm")["value"].mean()
        means = means[means.index.isin(candidates)]
        if len(means):
            arm = str(means.idxmax() if measure.maximize else means.idxmin())
            bound = "highest" if measure.maximize else "lowest"
            parts.append(
                f"The {bound} {measure.title}, {measure.show(means[arm])}, is that of "
                f"{tables.label(arm)}."
            )
    return " ".join(parts) or None


def _progress_sentence(tables: StudyTables) -> str:
    counts = tables.results["outcome"].value_counts()
    asked = len(tables.suggestions)
    parts = [f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if outcome in counts]
    if waiting := asked - len(tables.results):
        parts.append(f"{waiting} not ended yet")
    trials = "1 trial" if asked == 1 else f"{asked} trials"
    return f"It rests on {trials} of {len(tables.arms)} arms: {', '.join(parts) or 'none yet'}."
