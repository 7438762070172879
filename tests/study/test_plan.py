"""What a study will take: counted by hand, and compared with the model itself."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from study.fit import DataSize, data_problems, data_size
from study.loading import parse_spec
from study.plan import arm_cost, count_parameters, plan
from study.spec import Resources
from trainables.config import TrialConfig
from trainables.data import open_dataset, prepare
from trainables.mae import build_mae
from trainables.speed import Speeds

torch.set_num_threads(1)

DATA = DataSize(
    (64, 64), 3, pretrain_images=100, train_images=50, train_groups=9, classes=(), shown={}
)
CELLS = {"train": frozenset({"cell"}), "val": frozenset({"cell"})}
LABELLED = DataSize((64, 64), 3, 100, 50, 9, ("background", "cell"), CELLS)


def study(rest="", search="model.patch: {choices: [4, 8, 16]}", trials=10, sampler="grid"):
    text = f"""\
study: s
data: {{source: smears, size: 64}}
trial: {{model: {{size: pico, patch: 8, decoder: {{depth: 1, width: 64}}}}}}
search: {{{search}}}
objectives: [{{metric: pretrain/probe_psnr, goal: maximize}}]
sampler: {sampler}
budget: {{trials: {trials}}}
{rest}"""
    return parse_spec(text, Path(), where="s.yaml")


def made(spec, data=DATA, **options):
    return plan(spec, data, **({"cpus": 8, "gpus": 0} | options))


@pytest.mark.parametrize("patch, channels, width", [(8, 3, 64), (16, 1, 128)])
@pytest.mark.parametrize("strategy", ["random", "hpm"])
def test_parameters_are_those_of_the_model(patch, channels, width, strategy):
    model = {"size": "pico", "patch": patch, "decoder": {"depth": 3, "width": width}}
    config = TrialConfig.model_validate({"model": model, "masking": {"strategy": strategy}})
    model = build_mae(config, (64, 32), channels, seed=0)
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(config, (64, 32), channels) == expected


def test_a_teacher_and_an_order_to_learn_need_memory():
    def memory(strategy, **more):
        config = study().trial.model_dump(mode="json")
        config["masking"]["strategy"] = {"name": strategy} | more
        return arm_cost(TrialConfig.model_validate(config), DATA, Resources())

    plain, taught, ranked = memory("random"), memory("anatomask"), memory("hpm")
    assert taught.memory_bytes - plain.memory_bytes == 4 * plain.parameters
    absolute = memory("hpm", difficulty_loss="absolute")
    # 48 of 64 patches hidden, 17 bytes a pair, 64 images
    assert ranked.memory_bytes - absolute.memory_bytes == 48**2 // 2 * 17 * 64


def test_tokens_are_counted_by_hand():
    cost = arm_cost(study().trial, DATA, Resources())
    assert (cost.patch, cost.tokens, cost.visible_tokens) == (8, 64, 16.0)


def test_a_grid_has_its_arms_and_the_control_is_one_of_them():
    found = made(study())
    assert (found.grid_arms, found.searched_arms, found.trials) == (2, 2, 3)
    assert found.warnings == []
    assert made(study("seeds: 3\n", trials=20)).trials == 9
    assert made(study("controls: [random-init, frozen]\n"), LABELLED).trials == 5


def test_the_cheapest_and_the_dearest_arm_are_those_of_the_ends():
    found = made(study(sampler="tpe", trials=30))
    assert (found.cheapest.patch, found.control.patch, found.dearest.patch) == (16, 8, 4)
    assert found.cheapest.flops < found.control.flops < found.dearest.flops
    assert (found.searched_arms, found.trials, found.grid_arms) == (29, 30, None)


def test_hours_by_hand():
    spec = study(search="", sampler="random")
    found = made(spec, measure=lambda config: Speeds(1e9, None), cpus=1)
    assert found.trials == 1
    assert found.flops == found.control.flops
    assert found.hours == pytest.approx(found.control.flops / 1e9 / 3600)
    assert made(spec).hours is None
    two = study("seeds: 2\nresources: {workers: 2}\n", search="", sampler="random")
    half = made(two, measure=lambda config: Speeds(1e9, None), cpus=4)
    assert half.hours == pytest.approx(found.hours / 2)


def test_each_phase_takes_as_long_as_its_own_speed_says():
    found = made(study(), LABELLED, cpus=1, measure=lambda config: Speeds(1e9, 1e8))
    alike = made(study(), LABELLED, cpus=1, measure=lambda config: Speeds(1e9, 1e9))
    assert found.hours_of.pretrain == alike.hours_of.pretrain
    assert found.hours_of.segment == pytest.approx(10 * alike.hours_of.segment)
    assert alike.hours_of.segment > 0
    assert alike.hours == pytest.approx(found.flops / 1e9 / 3600)


def test_random_weights_are_not_pretrained():
    found = made(study("seeds: 2\n", search="", sampler="random"), LABELLED)
    assert found.trials == 4
    twice = 2 * found.control.pretrain_flops + 4 * found.control.segment_flops
    assert found.flops == pytest.approx(twice)


def test_arms_that_were_not_timed_are_as_fast_as_the_size_of_their_steps_says():
    asked = []

    def measure(config):
        asked.append(config.model.patch)
        return Speeds({8: 1e9, 16: 1e8, 4: 1e9}[config.model.patch], None)

    spec = study(search="model.patch: {choices: [4, 8, 16]}, pretrain.batch: {choices: [32, 64]}")
    found = made(spec, cpus=1, measure=measure)
    assert asked == [8, 16, 4]  # the control, the cheapest, the dearest
    flat = made(spec, cpus=1, measure=lambda config: Speeds(1e9, None))
    slow = made(spec, cpus=1, measure=lambda config: Speeds(1e8, None))
    assert flat.hours < found.hours < slow.hours


def test_pretraining_that_all_arms_share_is_paid_once_a_seed():
    labels = "  segment.labels: {choices: [1, 2, 4]}"
    found = made(study("seeds: 2\n", search=labels, sampler="grid", trials=8))
    once = found.control.pretrain_flops + found.control.segment_flops * 4
    assert found.flops == pytest.approx(2 * once)  # the control and three arms


def test_confirmations_come_on_top():
    found = made(study("confirm: {arms: 5, seeds: 2, verdict: 4}\n"))
    # two searched arms, of which the best gets four more, and the control; nothing is labelled
    assert (found.trials, found.confirmations) == (3, 2 * 2 + 2 * 4)
    found = made(study("confirm: {arms: 5, seeds: 2}\n"))
    assert (found.trials, found.confirmations) == (3, 6)  # two searched arms and the control


@pytest.mark.parametrize(
    "resources, cpus, gpus, expected",
    [
        ("{}", 8, 0, 8),
        ("{workers: 4}", 11, 0, 2),
        ("{workers: 2, gpus_per_worker: 1}", 64, 8, 4),
        ("{gpus_per_worker: 0.5}", 3, 8, 3),
        ("{concurrent: 2}", 8, 0, 2),
        ("{gpus_per_worker: 1}", 8, 0, 0),
        # GPUs that are there are used, unless the study says otherwise
        ("{}", 8, 2, 2),
        ("{workers: 4}", 8, 2, 2),
        ("{gpus_per_worker: 0}", 8, 2, 8),
    ],
)
def test_as_many_trials_at_once_as_fit(resources, cpus, gpus, expected):
    found = made(study(f"resources: {resources}\n"), cpus=cpus, gpus=gpus)
    assert found.concurrent == expected


def test_what_will_disappoint_is_said():
    assert "nothing can start" in made(study("resources: {gpus_per_worker: 1}\n")).warnings[0]
    assert "stays incomplete" in made(study(trials=2)).warnings[0]
    assert "first 10 arms by chance" in made(study(sampler="tpe")).warnings[0]
    last = made(study("seeds: 2\n", sampler="random", trials=9)).warnings[0]
    assert "the last arm gets 1 of 2 seeds" in last


def test_a_metric_by_which_arms_cannot_be_compared_is_told_and_not_refused():
    native = "{metric: pretrain/native_psnr_all, goal: maximize}"
    halving = "stopping: {name: halving, metric: pretrain/native_psnr_hidden}\n"
    spec = parse_spec(
        study(halving).text.replace("objectives: [", f"objectives: [{native}, "),
        Path(),
        where="s.yaml",
    )
    depends = "depends on the trial's own ratio and patch: arms that differ in them cannot be"
    assert made(spec).warnings == [
        f"objectives: pretrain/native_psnr_all {depends} compared by it",
        f"stopping: pretrain/native_psnr_hidden {depends} compared by it",
    ]
    assert data_problems(spec, DATA) == []
    assert made(study("stopping: halving\n")).warnings == []


def test_labels_cost_a_second_phase():
    spec = study()
    without, labelled = (arm_cost(spec.trial, data, Resources()) for data in (DATA, LABELLED))
    assert without.segment_flops == 0 < labelled.segment_flops
    segment = spec.trial.segment.model_copy(update={"encoder": "random-init"})
    config = spec.trial.model_copy(update={"segment": segment})
    twin = arm_cost(config, LABELLED, Resources())
    assert (twin.pretrain_flops, twin.flops) == (0, twin.segment_flops)


def test_what_only_the_data_can_tell_is_told():
    assert data_problems(study(), DATA) == []
    segment = study().objectives[0].model_copy(update={"metric": "segment/miou"})
    spec = study().model_copy(update={"objectives": [segment]})
    assert "no labels" in data_problems(spec, DATA)[0]
    assert data_problems(spec, LABELLED) == []
    of_class = segment.model_copy(update={"metric": "segment/iou/cel"})
    spec = study().model_copy(update={"objectives": [of_class]})
    assert "expected a class of the data: background, cell" in data_problems(spec, LABELLED)[0]
    for data, reason in [
        ({"train": CELLS["train"], "val": frozenset()}, "no validation mask shows anything but"),
        ({"train": frozenset(), "val": CELLS["val"]}, "no training mask shows anything but"),
        ({"train": CELLS["train"], "val": frozenset({"rare"})}, "no validation mask shows cell;"),
    ]:
        of_cells = segment.model_copy(update={"metric": "segment/iou/cell"})
        spec = study().model_copy(update={"objectives": [of_cells]})
        assert reason in data_problems(spec, replace(LABELLED, shown=data))[0]
    case = segment.model_copy(update={"metric": "segment/hd95/cell", "goal": "minimize"})
    spec = study().model_copy(update={"objectives": [case]})
    volumes = replace(LABELLED, size=(64, 64, 64), channels=1)
    assert data_problems(spec, volumes) == []
    assert "measured of volumes, but the images have 2 axes" in data_problems(spec, LABELLED)[0]
    outside = case.model_copy(update={"metric": "segment/hd95/background"})
    spec = study().model_copy(update={"objectives": [outside]})
    assert data_problems(spec, volumes)[0].endswith("expected a class of the data: cell")
    number = case.model_copy(update={"metric": "segment/count_error/background"})
    spec = study().model_copy(update={"objectives": [number]})
    assert data_problems(spec, LABELLED)[0].endswith("expected a class of the data: cell")
    few = study(search="segment.labels: {choices: [2, 9, 10, null]}")
    assert data_problems(few, LABELLED) == [
        "search.segment.labels: given 10, but the train split has 9 labelled groups; expected at "
        "most as many, or null for all of them"
    ]
    odd = replace(DATA, size=(60, 60))
    assert any("does not divide the image size 60x60" in one for one in data_problems(study(), odd))


def test_operations_that_buy_less_than_a_step_are_told_by_line():
    trial = "patch: 8, decoder: {depth: 1, width: 64}}"
    text = study().text.replace(trial, f"{trial}, pretrain: {{flops: 4e9}}, segment: {{flops: 10}}")
    spec = parse_spec(text, Path(), where="s.yaml")
    (small,) = data_problems(spec, DATA)  # of patch 8 and 16 it buys a step
    assert small.startswith("s.yaml:3: trial.pretrain.flops: given 4e+09, but a step of patch 4")
    assert small.endswith("operations; expected as many at least, or a smaller pretrain.batch")
    found = data_problems(spec, LABELLED)
    assert sum("trial.segment.flops: given 10" in problem for problem in found) == 3
    searched = text.replace("search: {", "search: {pretrain.flops: {choices: [5e8, 1e12]}, ")
    spec = parse_spec(searched, Path(), where="s.yaml")
    assert data_problems(spec, DATA)[0].startswith("s.yaml:4: search.pretrain.flops: given 5e+08")


@pytest.mark.parametrize("setting", ["objectives", "stopping"])
def test_the_dense_probe_needs_labels_of_two_groups(setting):
    dense = "metric: pretrain/dense_miou"
    spec = study(f"stopping: {{name: halving, {dense}}}\n")
    if setting == "objectives":
        objective = spec.objectives[0].model_copy(update={"metric": "pretrain/dense_miou"})
        spec = study().model_copy(update={"objectives": [objective]})
    assert data_problems(spec, LABELLED) == []
    for data, reason in [
        (DATA, "but the data have no labels"),
        (replace(LABELLED, train_groups=1), "of which there is 1; expected another metric such as"),
    ]:
        (problem,) = data_problems(spec, data)
        assert problem.startswith(f"{setting}: given 'pretrain/dense_miou', ") and reason in problem


def test_a_prepared_data_set_and_this_machine_are_enough(tmp_path):
    text = "{source: smears, size: 32, images: 8, val: 4, test: 4}"
    spec = parse_spec(
        study().text.replace("{source: smears, size: 64}", text), Path(), where="s.yaml"
    )
    dataset = open_dataset(prepare(spec.data, tmp_path, tmp_path))
    found = plan(spec, dataset)
    assert (found.control.tokens, found.concurrent >= 1) == (16, True)
    assert data_problems(spec, data_size(dataset)) == []
    one_line = found.describe()["control arm"]
    assert "16 tokens, 4 visible" in one_line and "steps of pretraining, " in one_line
