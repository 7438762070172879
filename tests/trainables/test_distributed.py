"""pytest tests/trainables/test_distributed.py"""

import pytest
import torch

from trainables import distributed
from trainables.config import TrialConfig, completed

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("precision", "with_amx", "without"),
    [
        ("fp32", False, False),
        ("bf16", True, True),
        ("fast", True, False),
        ("auto", False, False),
    ],
)
def test_a_cpu_computes_in_half_precision_where_it_is_faster(
    monkeypatch, precision, with_amx, without
):
    square = torch.ones(2, 2)
    for has_amx, expected in ((True, with_amx), (False, without)):
        monkeypatch.setattr(distributed, "_has_amx", lambda has_amx=has_amx: has_amx)
        with distributed.autocast(precision, CPU):
            assert ((square @ square).dtype == torch.bfloat16) is expected


def test_a_trial_of_release_0_1_keeps_what_its_precision_meant():
    before = completed({"pretrain": {"batch": 8}, "segment": {"precision": "fp32"}})
    config = TrialConfig.model_validate(before)
    assert (config.pretrain.precision, config.segment.precision) == ("auto", "fp32")
    assert TrialConfig().pretrain.precision == TrialConfig().segment.precision == "fast"
