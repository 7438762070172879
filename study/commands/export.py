"""`export`: a pretrained encoder, out of a study."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from study import mirror
from study.best import IN_WORDS, NoEncoder, ahead, best_encoder, of_study
from study.commands.finding import find_study
from study.commands.terminal import say
from study.gain import best_gain, gains, in_words, rival, warning
from study.ledger import read_results, read_rows, read_suggestions
from study.loading import spec_of
from study.measured import measure
from trainables.errors import UserError
from trainables.fillings import Gain


def copy_encoder(name: str, output: Path, arm: str | None, storage: str | None) -> None:
    """Copy the pretrained encoder of an arm's best trial into a new folder."""
    folder = find_study(name, storage)
    spec, suggestions = spec_of(folder), read_suggestions(folder)
    measured, results = measure(read_rows(folder)), read_results(folder)
    mirror.pull_pictures(folder)
    able = [each for each in suggestions if folder.encoder(each.trial).is_dir()]
    objective, found = spec.objectives[0], of_study(spec, suggestions, results, measured)
    best = best_encoder(able, found, objective, measured, arm)
    if isinstance(best, NoEncoder):
        known = ", ".join(best.arms) or "none yet"
        known += "; name one with --arm" if best.arms and arm is None else ""
        what = f"no encoder of arm {arm!r}" if arm else "no encoder of a searched arm with a score"
        raise UserError(f"{name}: {what}; arms with one: {known}")
    if output.exists():
        raise UserError(f"{output}: exists already; name a new folder with --output")
    encoder = folder.encoder(best.trial)
    mirror.pull_folder(folder, encoder)
    shutil.copytree(encoder, output)
    for one in ahead(found, objective.goal) if arm is None else ():
        say(f"ahead of it: {IN_WORDS[one.group]}, {objective.metric} {one.mean:.4g}")
    say(f"arm {best.arm}, trial {best.trial}: {output}")
    learnt = gains(measured)
    if best.trial in learnt:
        say(f"probe gain {in_words(learnt[best.trial])}")
        for problem in problems(best.trial, learnt):
            say(f"warning: {problem}")
    say(json.loads((output / "encoder.json").read_text())["usage"])


def problems(trial: str, learnt: Mapping[str, Gain]) -> Iterator[str]:
    """What speaks against a trial's encoder, which has a gain."""
    leader = best_gain(learnt)
    assert leader is not None
    study = warning(leader[1])
    if study is not None:
        yield study
    elif not learnt[trial].is_learnt:
        yield (
            f"this encoder fills in hidden pixels no better than {rival(learnt[trial])} does; that "
            f"of trial {leader[0]} does ({in_words(leader[1])}): its arm can be given with --arm"
        )
