"""One trial's configuration and its identity.

pytest tests/trainables/test_config.py
"""

import json

import pytest
from pydantic import ValidationError

from study.mistakes import place
from trainables.config import (
    BEFORE_0_2,
    SIZES,
    ProbeConfig,
    TrialConfig,
    arm_id,
    completed,
    conflicts,
    content_of,
    geometry_misfits,
    in_epochs,
    trial_id,
    unit_of_length,
)
from trainables.errors import UserError
from trainables.settings import canonical_json, digest


def trial(**sections):
    return TrialConfig.model_validate(sections)


def test_a_trial_is_complete_without_a_word():
    config = TrialConfig()
    assert config.masking.ratio.options() == {"value": 0.75}
    assert config.masking.strategy.name == "random"
    assert config.pretrain.optimizer.options()["base_lr"] == 1.5e-4
    assert config.segment.optimizer.options()["base_lr"] == 1e-2


def test_equal_settings_are_the_same_trial():
    spelled_out = trial(
        pretrain={"visible_weight": 0, "optimizer": "adamw"},
        masking={"ratio": {"value": 0.75, "name": "constant"}},
        model={"patch": 8, "size": "tiny"},
    )
    assert arm_id(spelled_out) == arm_id(TrialConfig())
    assert trial_id(spelled_out, 3, "data") == trial_id(TrialConfig(), 3, "data")


def test_a_phase_is_as_long_as_one_unit_says():
    config = trial(pretrain={"images": 640}, segment={"flops": 1e12})
    assert (config.pretrain.epochs, config.pretrain.images) == (None, 640)
    assert unit_of_length(config.pretrain) == "images"
    assert unit_of_length(config.segment) == "flops"
    assert in_epochs(config.segment, 3) == trial(segment={"epochs": 3}).segment
    assert TrialConfig.model_validate(config.model_dump(mode="json")) == config
    for given, what in [
        ({"epochs": 2, "images": 640}, "given epochs and images; expected one of epochs, images"),
        ({"images": 640, "flops": 1e12}, "given images and flops"),
        ({"epochs": None}, "given epochs: null; expected one of"),
        ({"flops": 0}, "greater than 0"),
    ]:
        with pytest.raises(ValidationError, match=what):
            trial(pretrain=given)


def test_a_unit_that_is_not_used_is_not_written():
    written = TrialConfig().model_dump(mode="json")
    assert list(written["pretrain"])[:2] == ["epochs", "batch"]
    assert not {"images", "flops"} & (written["pretrain"].keys() | written["segment"].keys())
    assert trial(pretrain={"epochs": 40}) == TrialConfig()


def test_a_number_for_all_axes_stays_a_number():
    written = TrialConfig().model_dump(mode="json")
    assert (written["model"]["patch"], written["masking"]["unit"]) == (8, None)
    # pinned, as a study goes on only while its arms' ids stay: a new setting changes them, unless
    # it says what went without saying before
    before = TrialConfig.model_validate(
        {
            "model": {"positions": "pixels"},
            "pretrain": {"precision": "auto"},
            "segment": {
                "precision": "auto",
                "decoder_first": 0.0,
                "clip": None,
                "layer_decay": 0.75,
                "augment": "flips",
            },
        }
    )
    assert arm_id(before) == "8d89ebdf"
    assert arm_id(TrialConfig()) == "273fc6cd"


def test_equal_edges_along_all_axes_are_the_same_trial_however_spelt():
    lists = trial(model={"patch": [4, 4, 4]}, masking={"unit": [8, 8, 8]})
    numbers = trial(model={"patch": 4}, masking={"unit": 8})
    assert arm_id(lists) == arm_id(numbers)
    assert trial_id(lists, 0, "data") == trial_id(numbers, 0, "data")
    turned = [trial(model={"patch": patch}) for patch in ([4, 8, 8], [8, 4, 8], [8, 8, 4], [8, 8])]
    assert len({arm_id(config) for config in turned}) == 4
    assert arm_id(turned[-1]) == arm_id(trial(model={"patch": 8}))


def test_edges_are_one_for_all_axes_or_one_for_each():
    config = trial(model={"patch": 4}, masking={"unit": [4, 8, 12]})
    assert config.patch_edges(3) == (4, 4, 4)
    assert config.unit_edges(3) == (4, 8, 12)
    assert config.patches_per_unit(3) == (1, 2, 3)
    assert trial(model={"patch": [2, 4]}).unit_edges(2) == (2, 4)
    with pytest.raises(UserError, match=r"masking.unit: given \[4, 8, 12\], 3 edges, .* 2 axes"):
        config.unit_edges(2)
    with pytest.raises(UserError, match=r"model.patch: given \[2, 4\], 2 edges, .* 3 axes"):
        trial(model={"patch": [2, 4]}).unit_edges(3)


@pytest.mark.parametrize("edges", [[], [4, 0], [4, 8.0], [4, True], True, "8", [[4, 8]], None])
def test_edges_that_are_none_are_refused(edges):
    with pytest.raises(ValidationError, match="expected a valid integer from 1 on, or a list"):
        trial(model={"patch": edges})


def test_another_setting_seed_or_data_is_another_trial():
    config = TrialConfig()
    other = trial(masking={"ratio": {"name": "constant", "value": 0.7500001}})
    ids = {
        trial_id(config, 0, "a"),
        trial_id(config, 1, "a"),
        trial_id(config, 0, "b"),
        trial_id(other, 0, "a"),
    }
    assert len(ids) == 4
    assert {len(word) for word in ids} == {12}
    assert len(arm_id(config)) == 8


def test_a_trial_is_written_and_read_back_equal():
    ratio = {"name": "step", "values": [0.2, 0.8], "at": [0.5]}
    config = trial(masking={"ratio": ratio, "unit": [4, 8, 8]}, model={"patch": [2, 8, 4]})
    text = config.model_dump_json()
    assert TrialConfig.model_validate_json(text) == config
    assert arm_id(TrialConfig.model_validate(json.loads(text))) == arm_id(config)


def test_canonical_json_by_hand():
    assert canonical_json({"b": [1, 0.1], "a": None}) == '{"a":null,"b":[1,0.1]}'
    assert digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({"model": {"patchsize": 8}}, "model.patchsize"),
        ({"model": {"patch": 0}}, "model.patch"),
        ({"model": {"size": "giant"}}, "model.size"),
        ({"model": {"decoder": {"width": 96}}}, "model.decoder.width"),
        ({"masking": {"ratio": {"name": "constant", "value": 1.5}}}, "masking.ratio.value"),
        ({"masking": {"ratio": {"name": "constant", "value": 1.0}}}, "masking.ratio"),
        (
            {
                "masking": {
                    "strategy": {"name": "anatomask", "guided": {"name": "linear", "start": 0}}
                }
            },
            "masking.strategy.guided.end",
        ),
        (
            {"masking": {"ratio": {"name": "step", "values": [0.1, 0.2], "at": [0.9, 0.1]}}},
            "masking.ratio",
        ),
        ({"pretrain": {"epochs": 0}}, "pretrain.epochs"),
        ({"pretrain": {"optimizer": {"name": "adamw", "lr": 1}}}, "pretrain.optimizer.lr"),
        ({"segment": {"layer_decay": 1.5}}, "segment.layer_decay"),
        ({"seed": 1}, "seed"),
    ],
)
def test_what_does_not_belong_is_refused_at_its_place(given, where):
    with pytest.raises(ValidationError) as caught:
        TrialConfig.model_validate(given)
    (error,) = caught.value.errors()
    assert ".".join(map(str, place(error, given))) == where


@pytest.mark.parametrize(
    ("decoder", "weight", "refused"),
    [
        ({}, 0.5, []),
        ({"attention": "cross", "predicted": 0.25}, 0, []),
        ({"attention": "cross"}, 0.5, ["pretrain.visible_weight"]),
        ({"predicted": 0.25}, 0.5, ["model.decoder.predicted"]),
    ],
)
def test_what_excludes_each_other_is_told(decoder, weight, refused):
    config = trial(model={"decoder": decoder}, pretrain={"visible_weight": weight})
    assert list(conflicts(config)) == refused


def test_a_trial_never_changes():
    with pytest.raises(ValidationError, match="frozen"):
        TrialConfig().model.patch = 4


def test_the_mask_unit_is_the_patch_unless_it_is_given():
    assert TrialConfig().unit == 8
    assert trial(masking={"unit": 32}).unit == 32


def test_attention_heads_are_64_wide():
    assert {size["width"] / size["heads"] for size in SIZES.values()} == {64}


@pytest.mark.parametrize(
    ("patch", "unit", "size", "expected"),
    [
        (8, 16, (64, 96), {}),
        (8, None, (60, 96), {"model.patch": "8 does not divide", "masking.unit": "60x96"}),
        (8, 12, (96, 96), {"masking.unit": "12 is not a multiple of the patch size 8"}),
        (8, 32, (64, 80), {"masking.unit": "32 does not divide the image size 64x80"}),
        (8, 64, (64, 64), {"masking.unit": "64 is the whole image"}),
        (16, 16, (64, 64), {"model.patch": "16 does not divide the probe's unit 8"}),
        ([2, 4, 8], [2, 8, 8], (8, 16, 24), {}),
        (
            [2, 4, 8],
            None,
            (8, 18, 24),
            {"model.patch": "2x4x8 does not divide the image size 8x18x24 (axis 2 of 3: 4 into 18)"}
            | {"masking.unit": "axis 2 of 3"},
        ),
        (
            [2, 4, 8],
            [4, 8, 4],
            (8, 16, 24),
            {"masking.unit": "4x8x4 is not a multiple of the patch size 2x4x8 (axis 3 of 3"},
        ),
        (4, [4, 8, 16], (8, 16, 24), {"masking.unit": "(axis 3 of 3: 16 into 24)"}),
        ([4, 8], [4, 8], (4, 8), {"masking.unit": "4x8 is the whole image (4x8)"}),
        (
            [2, 4, 3],
            None,
            (8, 16, 24),
            {"model.patch": "2x4x3 does not divide the probe's unit 8 (axis 3 of 3: 3 into 8)"},
        ),
        ([4, 8], 8, (8, 8, 8), {"model.patch": "4x8 has 2 edges, but an image of 8x8x8 has 3"}),
        (8, [8, 8, 8], (16, 16), {"masking.unit": "8x8x8 has 3 edges, but an image of 16x16 has"}),
    ],
)
def test_geometry_that_does_not_fit_is_named(patch, unit, size, expected):
    config = trial(model={"patch": patch}, masking={"unit": unit})
    misfits = geometry_misfits(config, size, probe_unit=8)
    assert misfits.keys() == expected.keys()
    assert all(words in misfits[place].text for place, words in expected.items())


def test_probe_ratios_are_shares():
    assert ProbeConfig().ratios == (0.25, 0.5, 0.75)
    with pytest.raises(ValidationError, match="less than 1"):
        ProbeConfig(ratios=(0.5, 1.0))


def test_what_release_0_1_recorded_means_what_it_did():
    """Its records lack settings that came later; so do the names of its arms."""
    recorded = TrialConfig().model_dump(mode="json")
    for path in BEFORE_0_2:
        section, setting = path.split(".")
        del recorded[section][setting]
    recorded["pretrain"]["loss"] = {"name": "rrl", "epsilon": 0.1}
    recorded["masking"]["strategy"] = {"name": "amlp", "category_weight": 0.1}
    config = TrialConfig.model_validate(completed(recorded))
    assert config.pretrain.loss.relative_to == "patch"
    assert config.masking.strategy.category_reads == "descriptors"
    assert config.model.positions == "pixels" and config.segment.clip is None
    content = content_of(config)
    assert content["pretrain"]["loss"] == recorded["pretrain"]["loss"]
    assert "category_reads" not in content["masking"]["strategy"]
    today = TrialConfig.model_validate({"pretrain": {"loss": "rrl"}})
    assert content_of(today)["pretrain"]["loss"]["relative_to"] == "image"
