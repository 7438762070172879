"""The study file. All mistakes at once, each with its line, what was given and what is expected."""

import json
import re
from pathlib import Path
from typing import Annotated

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, ValidationError

from study.loading import Difference, difference, load_spec, parse_spec
from study.mistakes import explain
from study.optuna_study import OptunaStudy
from study.reader import read_yaml
from study.samplers import SAMPLERS
from study.spec import schema
from trainables.config import TrialConfig, arm_id
from trainables.errors import UserError
from trainables.named import named

GOOD = """\
study: platelets
question: Do small masks help the smallest cells?
data: {source: smears, size: 64}
trial:
  model: {size: pico, patch: 8, decoder: {depth: 2, width: 128}}
  masking: {strategy: random, ratio: {name: constant, value: 0.75}}
  pretrain: {epochs: 4, batch: 64, optimizer: {name: adamw, base_lr: 1.5e-4, betas: [0.9, 0.95]}}
  segment: {epochs: 2}
search:
  model.patch: {choices: [4, 8, 16]}
  masking.ratio:
    choices:
      constant: {name: constant, value: {low: 0.1, high: 0.9}}
      rising: {name: linear, start: {low: 0.1, high: 0.5}, end: {low: 0.5, high: 0.9}}
objectives:
  - {metric: segment/miou, goal: maximize}
  - {metric: pretrain/probe_psnr@0.25, goal: maximize}
sampler: {name: tpe}
stopping: {name: halving, metric: pretrain/probe_psnr}
confirm: {arms: 3, seeds: 5}
budget: {trials: 40}
resources: {workers: 2, gpus_per_worker: 1}
"""


def parse(text, folder="."):
    return parse_spec(text, Path(folder), where="s.yaml")


def mistakes(text):
    with pytest.raises(UserError) as error:
        parse(text)
    return str(error.value).splitlines()


def changed(old, new):
    assert old in GOOD
    return GOOD.replace(old, new)


def test_a_sampler_of_one_objective_gets_one_and_one_of_numbers_a_range():
    two = changed("sampler: {name: tpe}", "sampler: cma-es")
    one = two.replace("  - {metric: pretrain/probe_psnr@0.25, goal: maximize}\n", "")
    (line, *_) = [each for each in mistakes(two) if "sampler" in each]
    assert "given cma-es with 2 objectives; expected one objective, or one of tpe, gp" in line
    (line,) = [each for each in mistakes(one) if "sampler" in each]
    assert "given cma-es where no range is searched but under labels; expected a range" in line
    sound = one.replace("search:\n", "search:\n  pretrain.epochs: {low: 2, high: 4}\n")
    assert parse(sound).sampler.name == "cma-es"


def test_a_sound_file_is_read_with_its_defaults():
    spec = parse(GOOD)
    assert spec.study == "platelets"
    assert spec.trial.pretrain.optimizer.base_lr == 1.5e-4
    assert spec.trial.pretrain.optimizer.betas == (0.9, 0.95)
    assert spec.search["model.patch"].choices == [4, 8, 16]
    assert spec.sampler.name == "tpe"
    assert spec.stopping.options()["metric"] == "pretrain/probe_psnr"
    assert (spec.seeds, spec.seed, spec.rungs) == (1, 0, [0.0625, 0.125, 0.25, 0.5, 1.0])
    assert spec.controls == ["random-init"]
    assert spec.text == GOOD


def test_the_probe_unit_is_the_largest_patch_of_the_study():
    assert parse(GOOD).probe.unit == 16
    assert parse(changed("[4, 8, 16]", "[4, 8]")).probe.unit == 8
    assert parse(changed("[4, 8, 16]", "[2, 4]")).probe.unit == 8  # the control's
    assert parse(GOOD + "probe: {unit: 32}\n").probe.unit == 32


def test_ten_mistakes_give_ten_lines():
    text = """\
study: Platelets
data: {source: smeers, size: 64}
trial:
  model: {size: pcio, patch: 8.5}
  masking: {rato: 1, ratio: {name: linaer, start: 0.2, end: 0.4}}
  pretrain: {optimizer: {name: adamw, lr: 3}, epochs: "40"}
search:
  model.ptach: {choices: [4, 8]}
  masking.ratio:
    choices:
      constant: {name: constant, value: {low: 0.1, high: 1.9}}
objectives:
  - {metric: segment/miuo, goal: maximize}
sampler: tpee
budget: {trials: 10, trails: 3}
"""
    lines = mistakes(text)
    where = [line.split(": ")[0] + ": " + line.split(": ")[1] for line in lines]
    assert where == [
        "s.yaml:1: study",
        "s.yaml:2: data.source",
        "s.yaml:4: trial.model.size",
        "s.yaml:4: trial.model.patch",
        "s.yaml:5: trial.masking.ratio.name",
        "s.yaml:5: trial.masking.rato",
        "s.yaml:6: trial.pretrain.epochs",
        "s.yaml:6: trial.pretrain.optimizer.lr",
        "s.yaml:8: search.model.ptach",
        "s.yaml:11: search.masking.ratio.choices.constant.value",
        "s.yaml:13: objectives.0.metric",
        "s.yaml:14: sampler",
        "s.yaml:15: budget.trails",
    ]
    hints = dict(zip(where, lines, strict=True))
    assert "did you mean 'pico'?" in hints["s.yaml:4: trial.model.size"]
    assert "did you mean 'linear'?" in hints["s.yaml:5: trial.masking.ratio.name"]
    assert "did you mean 'ratio'?" in hints["s.yaml:5: trial.masking.rato"]
    assert "did you mean 'model.patch'?" in hints["s.yaml:8: search.model.ptach"]
    assert "did you mean 'segment/miou'?" in hints["s.yaml:13: objectives.0.metric"]
    assert "did you mean 'tpe'?" in hints["s.yaml:14: sampler"]
    assert "did you mean 'trials'?" in hints["s.yaml:15: budget.trails"]
    assert "given '40'; expected a valid integer" in hints["s.yaml:6: trial.pretrain.epochs"]
    assert "given 1.9; expected less than or equal to 1" in lines[9]


def test_mistakes_of_reading_and_of_meaning_are_told_together():
    lines = mistakes(changed("epochs: 2}", "epochs: 2, epochs: 0}") + "seed: &x 1\nseeds: -1\n")
    assert len(lines) == 4
    assert "given twice" in lines[0] and "greater than or equal to 1" in lines[1]
    assert "anchor" in lines[2] and lines[3].startswith("s.yaml:24: seeds: given -1")


@pytest.mark.parametrize(
    "value, line",
    [
        ("*x", "s.yaml:23: seed: an alias (*x); write its content out"),
        ("9" * 30, f"s.yaml:23: seed: given '{'9' * 30}'; expected a number of at most 64 bits"),
        (".nan", "s.yaml:23: seed: given '.nan'; expected a finite number"),
    ],
)
def test_a_value_that_cannot_be_read_is_told_once(value, line):
    assert mistakes(GOOD + f"seed: {value}\n") == [line]


def test_what_came_before_bad_syntax_is_told_too():
    lines = mistakes(GOOD + "seed: &x 1\nseeds: [1,")
    assert "seed: an anchor (&x)" in lines[0] and "not YAML" in lines[1]


@pytest.mark.parametrize(
    "old, new, line, words",
    [
        ("budget: {trials: 40}", "", 1, "budget: given nothing; expected this key"),
        ("study: platelets", "study: con", 1, "study: given 'con'"),
        ("study: platelets", "study: ../x", 1, "study: given '../x'"),
        ("size: 64}", "size: big}", 3, "data.size: given 'big'; expected a valid integer"),
        ("value: 0.75}", "value: 1.5}", 6, "trial.masking.ratio.value: given 1.5; expected less"),
        ("name: constant, value: 0.75", "name: linear, start: 0.2", 6, "end: given nothing"),
        ("ratio: {name: constant, value: 0.75}", "ratio: 0.75", 6, "trial.masking.ratio: given"),
        ("{name: constant, value: 0.75}", "linear", 6, "trial.masking.ratio.start: given nothing"),
        ("size: 64}", "size: [64]}", 3, "data.size: given"),
        ("trial:\n", "trial: 3\nignored:\n", 4, "trial: given 3; expected a mapping with model"),
        ("goal: maximize}\n  - {metric: p", "goal: max}\n  - {metric: p", 16, "given 'max'"),
        ("segment/miou", "segment/iou", 16, "expected segment/iou/<class>"),
        ("segment/miou", "segment/test_miou", 16, "nothing may be chosen by it"),
        ("segment/miou", "pretrain/miou", 16, "did you mean 'segment/miou'?"),
        ("segment/miou", "miou", 16, "did you mean 'segment/miou'?"),
        ("segment/miou", "segment/loss", 16, "losses differ"),
        ("segment/miou", "segment/detection", 16, "says nothing alone"),
        ("segment/miou", "pretrain/ratio", 16, "expected one of pretrain/"),
        ("probe_psnr@0.25", "probe_psnr@0.3", 17, "expected one of its ratios: 0.25, 0.5"),
        ("probe_psnr@0.25", "probe_gain@0.25", 17, "not measured per ratio"),
        ("segment/miou, goal: maximize", "segment/miou, goal: minimize", 16, "expected 'maximize'"),
        ("segment/miou", "segment/hd95", 16, "given 'maximize'; expected 'minimize'"),
        ("segment/miou", "segment/nsd@0.5", 16, "not measured per ratio"),
        ("segment/miou", "segment/case_dice/", 16, "case_dice or segment/case_dice/<c"),
        ("segment/miou", "segment/test_hd95", 16, "nothing may be chosen by it"),
        ("segment/miou", "pretrain/nsd", 16, "did you mean 'segment/nsd'?"),
        ("segment/miou", "pretrain/probe_psnr@0.25", 17, "twice"),
        ("metric: pretrain/probe_psnr}", "metric: pretrain/ratio}", 19, "stopping.metric: given"),
        ("name: halving", "name: halvign", 19, "did you mean 'halving'?"),
        ("{trials: 40}", "{trials: 1}", 21, "expected at least 2: the control arm"),
        ("workers: 2", "workers: 3", 7, "trial.pretrain.batch: given 64; expected a multiple of"),
        ("value: 0.75", "value: .nan", 6, "expected a finite number"),
    ],
)
def test_a_mistake_is_told_with_line_given_and_expected(old, new, line, words):
    told = [text for text in mistakes(changed(old, new)) if words in text]
    assert told, mistakes(changed(old, new))
    assert told[0].startswith(f"s.yaml:{line}: ")


SEARCH = "search:\n  model.patch: {choices: [4, 8, 16]}\n"


@pytest.mark.parametrize(
    "item, words",
    [
        ("model.patch: {choices: [4, 4]}", "expected choices that differ"),
        ("model.patch: {choices: []}", "a list of values, or labels"),
        ("model.patch: {choices: 4}", "a list of values, or labels"),
        ("model.patch: {low: 4}", "both `low` and `high`"),
        ("model.patch: {low: 8, high: 4}", "expected low < high"),
        ("model.patch: {low: 0, high: 4, log: true}", "expected low > 0"),
        ("model.patch: {low: 4, high: 8, step: 3}", "given step 3"),
        ("model.patch: {low: a, high: 8}", "low: given 'a'; expected a number"),
        ("model.patch: {low: 4, hihg: 8}", "did you mean 'high'?"),
        ("model.patch: {choices: [4], low: 4}", "and a range; expected one of them"),
        ("model.patch: {low: 4, high: 8, num: 3}", "given num with sampler tpe"),
        ("model.patch: {choices: [4, 8], prior: [1]}", "given a prior of 1 weights; expected"),
        ("model.patch: {low: 4, high: 8, prior: 9}", "likely value: a whole number from 4 to 8"),
        ("model.patch: {prior: [1]}", "expected `choices`, or both `low` and `high`"),
        ("model.patch: {choices: [4, eight]}", "choices.1: given 'eight'"),
        ("model.patch: {low: 4.0, high: 8.0}", "given 4.0; expected a valid integer"),
        ("pretrain.optimizer.weight_decay: {low: 0, high: 1}", "expected 0.0 and 1.0, or step"),
        ("masking.ratio.value: {low: 0.5, high: 0.9}", "lies within masking.ratio"),
        ("ratio: {choices: [1]}", "did you mean 'masking.ratio'?"),
        ("trial.model.size: {choices: [pico]}", "did you mean 'model.size'?"),
        ("model.decoder: {choices: [{depth: 2}]}", "without a label"),
        ("model.patch: {choices: [8, [4, 8]]}", "given [4, 8] without a label"),
        ("model.patch: {choices: {a: 8, b: [4, 0]}}", "b: given [4, 0]; expected a valid integer"),
        ("model.patch: {choices: {a: 8, b: [4, 8, 8]}}", "4x8x8 has 3 edges, but an image of 64x"),
        ("model.patch: {choices: {a: [4, 8], b: [8, 8, 8]}}", "given lists of 2 and 3 edges"),
        ("model.patch: {choices: {a: [4, 12]}}", "4x12 does not divide the image size 64x64 (axis"),
        ("model.decoder: {choices: {a/b: {depth: 2}}}", "without '.' and '/'"),
        ("model.decoder: {choices: {a: {dpth: 2}}}", "did you mean 'depth'?"),
        ("model.decoder: {choices: {a: {depth: {low: 3, high: 2}}}}", "expected low < high"),
        ("model.decoder: {choices: {a: {depth: {low: 0, high: 2}}}}", "given 0; expected greater"),
        ("pretrain.batch: {choices: [64, 65]}", "search.pretrain.batch: given 65"),
    ],
)
def test_a_search_that_cannot_work_is_refused(item, words):
    text = changed("  model.patch: {choices: [4, 8, 16]}\n", f"  {item}\n")
    told = [line for line in mistakes(text) if words in line]
    assert told, mistakes(text)
    assert told[0].startswith("s.yaml:10: search.")


def test_a_step_schedule_whose_lists_do_not_fit_is_refused_wherever_it_stands():
    step = "{name: step, values: [0.2, 0.5], at: [0.3, 0.6]}"
    assert "one more value" in mistakes(changed("{name: constant, value: 0.75}", step))[0]
    lines = mistakes(changed("      rising: ", f"      steps: {step}\n      rising: "))
    assert lines[0].startswith("s.yaml:14: search.masking.ratio.choices.steps: step needs one more")


RISING = """\
      rising:
        name: piecewise
        values:
          - {low: 0.1, high: 0.5}
          - {low: 0.3, high: 0.9}
          - 0.9
"""


def with_rising(old, new):
    """The study with a piecewise schedule, its lines 14 to 19, in which one thing is changed."""
    line = next(line for line in GOOD.splitlines(keepends=True) if "rising" in line)
    assert old in RISING
    return changed(line, RISING.replace(old, new))


def test_the_knots_of_a_schedule_can_be_searched():
    spec = parse(with_rising("", ""))
    assert spec.search["masking.ratio"].choices["rising"]["values"][2] == 0.9
    assert parse(spec.text).digest == spec.digest
    optuna_study = OptunaStudy(spec)
    assert "masking.ratio/rising.values.1" in optuna_study._distributions


@pytest.mark.parametrize(
    "old, new, line, place, words",
    [
        ("low: 0.3, high: 0.9", "low: 0.9, high: 0.3", 18, "values.1", "expected low < high"),
        ("low: 0.3, high: 0.9", "low: 0.3", 18, "values.1", "both `low` and `high`"),
        ("low: 0.3, high: 0.9", "low: 0.3, hgih: 0.9", 18, "values.1.hgih", "did you mean 'high'"),
        ("low: 0.3, high: 0.9", "low: x, high: 0.9", 18, "values.1.low", "expected a number"),
        ("low: 0.3, high: 0.9", "low: 0.3, high: 1.9", 18, "values.1", "given 1.9; expected less"),
        ("low: 0.3, high: 0.9", "low: 0.3, high: 0.9, num: 3", 18, "values.1.num", "sampler tpe"),
        ("low: 0.3, high: 0.9", "low: 0.3, high: 0.9, prior: 1.0", 18, "values.1", "from 0.3 to"),
        ("low: 0.1, high: 0.5", "low: 0, high: 1", 17, "values.0", "expected 0.0 and 1.0"),
        ("low: 0.1, high: 0.5", "choices: []", 17, "values.0", "expected `choices`"),
        ("low: 0.1, high: 0.5", "lo: 0.1", 17, "values.0", "given {'lo': 0.1}; expected"),
        (" 0.9\n", " 1.9\n", 19, "values.2", "given 1.9; expected less"),
        (" 0.9\n", " 1.0\n", 14, "", "given 1.0 at progress 1; expected a ratio above 0"),
        ("low: 0.1, high", "low: 0.0, high", 14, "", "given 0.0 at progress 0; expected a ratio"),
        ("        values", "        at: [0, 1]\n        values", 14, "", "as many rising places"),
    ],
)
def test_a_mistake_in_a_list_under_a_label_has_its_own_line(old, new, line, place, words):
    lines = mistakes(with_rising(old, new))
    where = f"search.masking.ratio.choices.rising{'.' * bool(place)}{place}"
    told = [text for text in lines if text.startswith(f"s.yaml:{line}: {where}: ")]
    assert told and words in told[0], lines


@pytest.mark.parametrize("name", ["random", "quasi-random", "grid", "pbt"])
def test_a_prior_is_refused_where_there_are_no_first_arms_to_shape(name):
    believed = with_rising("low: 0.3, high: 0.9", "choices: [0.3, 0.9], prior: [1, 2]")
    assert parse(believed).sampler.name == "tpe"
    told = mistakes(believed.replace("{name: tpe}", name))
    where = "s.yaml:18: search.masking.ratio.choices.rising.values.1.prior"
    (line,) = [each for each in told if each.startswith(where)]
    assert f"given a prior with sampler {name}, which has no first arms to shape" in line
    assert "leave it out, or take one of tpe, gp, cma-es, nsga-ii, nsga-iii" in line


def test_every_mistake_in_a_list_is_told_at_once():
    wrong = with_rising("low: 0.1, high: 0.5", "low: 0.5, high: 0.1")
    lines = mistakes(wrong.replace("low: 0.3, high: 0.9", "choices: {a: {low: 2, high: 1}}"))
    assert [line.partition(": given")[0] for line in lines] == [
        "s.yaml:17: search.masking.ratio.choices.rising.values.0",
        "s.yaml:18: search.masking.ratio.choices.rising.values.1.choices.a",
    ]


@pytest.mark.parametrize(
    "ratio, words",
    [
        ("{name: constant, value: 1.0}", "given 1.0 at progress 0; expected a ratio above 0 and"),
        ("{name: linear, start: 0.5, end: 0}", "given 0.0 at progress 1; expected a ratio above 0"),
        ("{name: uniform, low: 0.8, high: 0.2}", "uniform needs low <= high, got low 0.8 and high"),
        ("{name: amr, start: 0.8}", "amr rises, so it needs start <= end"),
    ],
)
def test_a_schedule_that_is_no_ratio_is_refused_wherever_it_stands(ratio, words):
    place = "trial.masking.ratio: "
    assert mistakes(changed("{name: constant, value: 0.75}", ratio))[0].startswith(
        f"s.yaml:6: {place}{words}"
    )
    label = changed("      rising: ", f"      wrong: {ratio}\n      rising: ")
    assert mistakes(label)[0].startswith(f"s.yaml:14: search.masking.ratio.choices.wrong: {words}")


def test_options_of_a_ratio_that_are_searched_by_themselves_must_go_together():
    start, end = GOOD.index("  masking.ratio:\n"), GOOD.index("objectives:")

    def study(ratio, *searched):
        search = "".join(f"  masking.ratio.{item}\n" for item in searched)
        text = GOOD[:start] + search + GOOD[end:]
        return text.replace("{name: constant, value: 0.75}", ratio)

    constant = "{name: constant, value: 0.75}"
    lines = mistakes(study(constant, "value: {low: 0.5, high: 1.0}"))
    assert lines == [
        "s.yaml:11: search.masking.ratio.value: given 1.0 at progress 0; expected a ratio above 0 "
        "and below 1"
    ]
    parse(study(constant, "value: {low: 0.5, high: 0.9}"))

    uniform = "{name: uniform, low: 0.1, high: 0.9}"
    parse(study(uniform, "low: {low: 0.1, high: 0.5}", "high: {low: 0.5, high: 0.9}"))
    # each goes together with the trial's value of the other
    lines = mistakes(study(uniform, "low: {low: 0.1, high: 0.7}", "high: {low: 0.5, high: 0.9}"))
    assert lines == [
        "s.yaml:12: search.masking.ratio.high: uniform needs low <= high, got low 0.7 and high 0.5"
    ]


def test_a_mistake_in_an_option_that_names_a_function_is_told_with_its_place():
    def still(progress: float, *, value: Annotated[float, Field(le=1)] = 0.5) -> float:
        """The same."""
        return value

    def anatomask(request: int, *, guided: named({"still": still, "other": still}) = "still"):
        """Guided by a share."""

    class Settings(BaseModel):
        strategy: named({"anatomask": anatomask, "other": anatomask})

    for guided, place, words in (
        ({"name": "still", "value": 2}, ("value",), "given 2; expected less than or equal to 1"),
        ({"name": "still", "valeu": 1}, ("valeu",), "did you mean 'value'?"),
        ({"name": "stil"}, ("name",), "given 'stil'; expected one of still, other (did you mean"),
        ("stil", (), "did you mean 'still'?"),
        (7, (), "given 7; expected a mapping with"),
    ):
        data = {"strategy": {"name": "anatomask", "guided": guided}}
        with pytest.raises(ValidationError) as caught:
            Settings.model_validate_json(json.dumps(data), strict=True)
        ((where, problem),) = explain(caught.value, Settings, data)
        assert where == ("strategy", "guided", *place)
        assert words in problem


@pytest.mark.parametrize(
    "old, new, line, words",
    [
        ("[4, 8, 16]", "[4, 8, 12]", 10, "12 does not divide the image size 64x64; take one of 2"),
        ("[4, 8, 16]", "[4, 8, 64]", 10, "64 makes 1 mask units of an image of 64x64"),
        ("strategy: random", "unit: 8", 6, "8 is not a multiple of the patch size 16; leave"),
        ("patch: 8", "patch: 6", 10, "6 does not divide"),
        ("budget", "probe: {unit: 8}\nbudget", 10, "16 does not divide the probe's unit 8"),
        ("budget", "probe: {unit: 24}\nbudget", 21, "24 does not divide the image size 64x64"),
        ("size: 64", "size: 60", 10, "8 does not divide the image size 60x60"),
    ],
)
def test_an_arm_that_cannot_run_is_refused_with_a_way_out(old, new, line, words):
    told = [text for text in mistakes(changed(old, new)) if words in text]
    assert told, mistakes(changed(old, new))
    assert told[0].startswith(f"s.yaml:{line}: ")


def test_the_probe_follows_the_longest_edge_along_every_axis():
    volumes = "data: {source: smears, size: [32, 64]}"
    patches = "{choices: {flat: [2, 16], tall: [16, 4], cube: 8}}"
    text = changed("data: {source: smears, size: 64}", volumes).replace(
        "{choices: [4, 8, 16]}", patches
    )
    assert parse(text).probe.unit == (16, 16)
    given = text + "probe: {unit: [16, 32]}\n"
    assert parse(given).probe.unit == (16, 32)
    (told,) = mistakes(text + "probe: {unit: [16, 48]}\n")
    assert "unit 16x48 does not divide the image size 32x64 into at least two" in told
    assert "expected one of 2, 4, 8, 16, or a list with a divisor of each of 32, 64" in told
    (told,) = mistakes(text + "probe: {unit: [16, 16, 16]}\n")
    assert "the probe's unit 16x16x16 has 3 edges, but an image of 32x64 has 2 axes" in told
    told = mistakes(text + "probe: {unit: [8, 32]}\n")
    assert "16x4 does not divide the probe's unit 8x32 (axis 1 of 2: 16 into 8)" in told[0]
    assert "such as [16, 16]" in told[0] or "such as 16" in told[0]


def test_every_combination_of_patch_and_unit_is_looked_at():
    unit = "  masking.unit: {choices: [8, 16]}\n"
    lines = mistakes(changed("  masking.ratio:\n", f"{unit}  masking.ratio:\n"))
    assert len(lines) == 1
    assert "search.masking.unit: 8 is not a multiple of the patch size 16" in lines[0]
    labels = "  model: {choices: {a: {patch: 16}, b: {patch: {choices: [8, 24]}}}}\n"
    lines = mistakes(changed("  model.patch: {choices: [4, 8, 16]}\n", labels))
    assert "s.yaml:10: search.model: 24 does not divide the image size 64x64" in lines[0]


def test_many_bad_patches_do_not_fill_the_screen():
    lines = mistakes(changed("{choices: [4, 8, 16]}", "{low: 1, high: 64}"))
    assert len(lines) < 12
    assert any("and more of the kind" in line for line in lines)


def test_a_grid_needs_points_and_names_the_line_that_lacks_them():
    text = changed("sampler: {name: tpe}", "sampler: grid")
    lines = mistakes(text)
    assert lines[0].startswith(
        "s.yaml:13: search.masking.ratio.choices.constant.value: given a range"
    )
    assert len(lines) == 3
    parse(re.sub(r"(high: 0\.\d)", r"\1, num: 3", text))


def test_a_grid_that_nobody_can_run_is_refused():
    text = changed("sampler: {name: tpe}", "sampler: grid")
    text = re.sub(r"(high: 0\.\d)", r"\1, num: 1000", text)
    assert "s.yaml:9: search: given a grid of more than 10,000 arms" in mistakes(text)[0]


def test_a_bare_name_stands_for_the_name_with_defaults():
    assert parse(changed("sampler: {name: tpe}", "sampler: tpe")).sampler.name == "tpe"
    text = changed("{name: constant, value: 0.75}", "constant")
    assert parse(text).trial.masking.ratio.value == 0.75
    assert (
        "did you mean 'constant'?"
        in mistakes(text.replace("ratio: constant", "ratio: constent"))[0]
    )


def test_relative_storage_lies_beside_the_study_file(monkeypatch, tmp_path):
    for name in ("RAY_JOB_ID", "MASKSTUDY_STORAGE"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "s.yaml"
    file.write_text(GOOD)
    spec = load_spec(file)
    assert spec.folder_of_yaml == tmp_path
    assert spec.place().folder == tmp_path / "studies"
    assert spec.storage_note is None
    assert parse(GOOD + "storage: /data/s\n").place().folder == Path("/data/s")
    assert parse(GOOD + "storage: ~/s\n").place().folder == Path.home() / "s"
    assert parse(GOOD + "storage: s3://b/c/\n").place().remote == "s3://b/c"
    for bad in ("ftp://b/c", "s3://b/../c", "s3://id:secret@b/c"):
        (line,) = mistakes(GOOD + f"storage: {bad}\n")
        assert "expected a folder, or a URI such as s3://bucket/prefix" in line
        assert "secret" not in line


def test_in_a_job_relative_storage_is_not_in_the_copy_that_ray_deletes(monkeypatch, tmp_path):
    monkeypatch.delenv("MASKSTUDY_STORAGE", raising=False)
    monkeypatch.delenv("RAY_JOB_ID", raising=False)
    copy = "/tmp/ray/session_2026-01-01_00-00-00_1_1/runtime_resources/working_dir_files/_ray_pkg_1"
    assert parse(GOOD, copy).place().folder == Path.home() / "maskstudy" / "studies"
    assert "studies" in parse(GOOD, copy).storage_note
    monkeypatch.setenv("RAY_JOB_ID", "01000000")
    assert parse(GOOD).place().folder == Path.home() / "maskstudy" / "studies"
    monkeypatch.setenv("MASKSTUDY_STORAGE", str(tmp_path))
    assert parse(GOOD).place().folder == tmp_path / "studies"
    assert str(tmp_path) in parse(GOOD).storage_note
    assert parse(GOOD + "storage: /data\n").storage_note is None


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a: " + b"x" * 300_000])
def test_a_file_that_is_no_study_is_refused(tmp_path, content):
    file = tmp_path / "s.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"{file}:1: ")):
        load_spec(file)
    with pytest.raises(UserError, match="cannot be read"):
        load_spec(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_spec(tmp_path)


def test_the_digest_is_of_the_meaning():
    assert parse(GOOD + "# a comment\n").digest == parse(GOOD).digest
    spelt_out = GOOD + "controls: [random-init]\nseed: 0\n"
    assert parse(spelt_out).digest == parse(GOOD).digest
    assert (
        parse(changed("workers: 2", "workers: 2, cpus_per_worker: 1")).digest == parse(GOOD).digest
    )
    assert parse(GOOD + "seed: 1\n").digest != parse(GOOD).digest


def test_a_worker_trains_on_one_gpu():
    with pytest.raises(UserError, match="given 2, but a worker trains on one GPU"):
        parse(changed("gpus_per_worker: 1", "gpus_per_worker: 2"))


def test_equal_texts_have_no_difference():
    assert difference(GOOD, GOOD + "# a comment\nseeds: 1\n") == []


@pytest.mark.parametrize(
    "old, new",
    [
        ("trials: 40", "trials: 41"),
        ("{arms: 3, seeds: 5}", "{arms: 2, seeds: 9}"),
        ("confirm: {arms: 3, seeds: 5}\n", ""),
        ("workers: 2", "workers: 1"),
        ("{workers: 2, gpus_per_worker: 1}", "{concurrent: 3}"),
        ("question: Do small masks help the smallest cells?", "question: Which ratio?"),
        ("seeds: 5}", "seeds: 5}\nstorage: elsewhere"),
    ],
)
def test_a_study_may_go_on_with_more_trials_or_other_machines(old, new):
    found = difference(GOOD, changed(old, new))
    assert found and all(one.is_compatible for one in found)


def test_fewer_trials_are_another_study():
    assert difference(GOOD, changed("trials: 40", "trials: 39")) == [
        Difference("budget.trials", 40, 39, False)
    ]
    found = difference(GOOD, changed("batch: 64", "batch: 32"))
    assert [str(one) for one in found] == ["trial.pretrain.batch: 64 -> 32"]


def _mutations(data, path=()):
    """Every file that differs in one leaf and is still valid."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        if isinstance(value, dict | list):
            yield from _mutations(value, (*path, key))
        elif isinstance(value, bool) or value is None:
            continue
        elif isinstance(value, int):
            yield (*path, key), value * 2
            yield (*path, key), value + 1
        elif isinstance(value, float):
            yield (*path, key), value * 0.9
        else:
            for other in ("other", "nano", "linear", "random", "none", "segment/dice", "minimize"):
                if other != value:
                    yield (*path, key), other


def test_every_single_change_is_seen_and_only_the_harmless_ones_are_compatible():
    data, _ = read_yaml(GOOD, "s.yaml")
    harmless = ("question", "budget", "confirm", "resources", "storage")
    seen = set()
    for path, value in _mutations(data):
        other = json.loads(json.dumps(data))
        around = other
        for part in path[:-1]:
            around = around[part]
        around[path[-1]] = value
        text = yaml.safe_dump(other).replace("0.00015", "1.5e-4")
        try:
            found = difference(GOOD, text)
        except UserError:
            continue
        assert found, path
        assert all(one.is_compatible for one in found) == (path[0] in harmless), (path, found)
        seen.add(path[0])
    assert seen >= {
        "study",
        "data",
        "trial",
        "search",
        "objectives",
        "sampler",
        "stopping",
        "budget",
    }


def test_the_schema_knows_names_and_options():
    found = schema()
    text = json.dumps(found)
    for word in ("constant", "linear", "halving", "tpe", "reduction", "base_lr", "random-init"):
        assert f'"{word}"' in text
    sampler = found["properties"]["sampler"]
    assert {"enum": list(SAMPLERS)} in sampler["anyOf"]
    strategy = found["$defs"]["MaskingConfig"]["properties"]["strategy"]
    assert any("random" in member.get("enum", []) for member in strategy["anyOf"])
    assert found["additionalProperties"] is False
    prior = found["$defs"]["SearchItem"]["properties"]["prior"]
    assert [kind["type"] for kind in prior["anyOf"]] == ["number", "array"]
    assert "weight above 0 for each choice" in prior["description"]


def test_settings_that_exclude_each_other_are_refused_where_the_search_joins_them():
    text = changed(
        "search:\n",
        "search:\n  model.decoder.attention: {choices: [self, cross]}\n"
        "  pretrain.visible_weight: {low: 0.0, high: 1.0}\n",
    )
    (line,) = mistakes(text)
    assert "search.pretrain.visible_weight: given 1 asks for visible patches" in line
    assert "no queries for them; set it to 0, or model.decoder.attention to self" in line


def test_the_control_is_the_trial_as_it_stands_in_the_file():
    spec = parse(GOOD)
    expected = TrialConfig.model_validate(read_yaml(GOOD, "s.yaml")[0]["trial"])
    assert arm_id(spec.trial) == arm_id(expected)


PLAIN = [None, True, 0, -1, 1, 8, 2**62, 0.5, 1e300, "", "tpe", "linear", "a/b", "x" * 99, "\n"]
TREES = [[], {}, [8], [[8]], {"name": "step"}, {"name": 3}, {"choices": [8]}, {"low": "a"}]
ITEMS = [
    {"choices": {"a": {"low": 1}}},
    {"choices": {"a": {"name": "constant"}}},
    {"low": 1, "high": 2**62},
    {"low": 0.1, "high": 0.9, "prior": 0.5},
    {"choices": [4, 8], "prior": [1, 1e300]},
    {"choices": {"a": {"choices": [4, 8], "prior": [1, 2]}, "b": 4}, "prior": [2, 1]},
    {"low": 4, "high": 64, "step": 4, "num": 3},
]
HOSTILE = st.sampled_from([*PLAIN, *TREES, *ITEMS])


def _places(data, path=()):
    if path:
        yield path
    inner = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in inner if isinstance(data, dict | list) else ():
        yield from (
            _places(value, (*path, key)) if isinstance(value, dict | list) else [(*path, key)]
        )


PLACES = list(_places(read_yaml(GOOD, "s.yaml")[0]))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PLACES), HOSTILE, st.booleans()), min_size=1, max_size=3))
def test_whatever_stands_in_the_file_only_a_user_error_is_raised(changes):
    data, _ = read_yaml(GOOD, "s.yaml")
    for path, value, is_new in changes:
        around = data
        try:
            for part in path[:-1]:
                around = around[part]
            key = f"{path[-1]}x" if is_new and isinstance(around, dict) else path[-1]
            around[key] = json.loads(json.dumps(value))
        except (KeyError, IndexError, TypeError):
            continue
    try:
        spec = parse(json.dumps(data))
    except UserError as error:
        assert all(line.startswith("s.yaml:") for line in str(error).splitlines())
    else:
        OptunaStudy(spec).ask(0)


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("", (0.5, 99.5)),
        (", percentiles: null", (0.5, 99.5)),
        (", percentiles: [1, 99]", (1, 99)),
        (", window: [-100, 200]", None),
    ],
)
def test_volumes_of_a_study_that_0_1_began_keep_their_intensities(said, read):
    """By default it cut off what lies beyond these percentiles; today that is kept."""
    data = f"{{source: volumes, folder: scans, size: [16, 16, 16]{said}}}"
    text = f"study: old\ndata: {data}\nbudget: {{trials: 4}}\n"
    spec = parse_spec(text, Path(), where="old.yaml", defaults="0.1")
    assert spec.data.options()["percentiles"] == read
    today = parse_spec(text, Path(), where="old.yaml")
    assert today.data.options()["percentiles"] == (read if "[" in said else None)
