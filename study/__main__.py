"""The command line: `maskstudy ...`, the same as `python -m study ...`.

A command imports what it needs when it is called, so none waits for the imports of another.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.errors import ClusterError
from trainables.errors import StorageError, UserError

if TYPE_CHECKING:
    from trainables.data import Dataset

EXIT_INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="the study file")]
Name = Annotated[
    str, typer.Argument(metavar="NAME", help="the study's name, its folder, or its YAML file")
]
Storage = Annotated[
    str | None,
    typer.Option(
        help="where studies are kept: a folder, or a URI such as s3://bucket/prefix; default: "
        "$MASKSTUDY_STORAGE, or else ./studies"
    ),
]
Address = Annotated[
    str | None,
    typer.Option(help="URL of the cluster's dashboard, such as http://127.0.0.1:8265"),
]


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from importlib import metadata

        print(f"maskstudy {metadata.version('maskstudy')}")
        raise typer.Exit()


@app.callback()
def everywhere(
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="print the version and exit"
        ),
    ] = False,
) -> None:
    """How should I mask? Studies of masked-autoencoder pretraining on your own images."""


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="your images, and masks")],
    output: Annotated[Path, typer.Option("--output", "-o", help="study file to write")] = Path(
        "study.yaml"
    ),
) -> None:
    """Look at a folder of images and write a study file for it, with what was guessed and why."""
    from study.commands.init import init_study

    init_study(folder, output)


@app.command()
def check(
    study: StudyFile,
    forecast: Annotated[
        float | None,
        typer.Option(
            min=1,
            metavar="SECONDS",
            help="pretrain the study's own trial for so long, and forecast the steps it takes to "
            "learn anything",
        ),
    ] = None,
    sheet: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html", help="write a page of images with their masks laid over them"
        ),
    ] = None,
    resolved: Annotated[
        bool,
        typer.Option("--resolved", help="only print the study file with every default spelt out"),
    ] = False,
) -> None:
    """Check a study file and print the plan: arms, trials, tokens, FLOPs, memory, hours."""
    from study.commands.check import check_study, print_resolved

    if resolved:
        print_resolved(study)
    else:
        write_sheet = partial(_build_sheet, output=sheet) if sheet else None
        check_study(study, forecast, write_sheet, _detectable_difference)


@app.command(name="try")
def try_(
    study: StudyFile,
    images: Annotated[
        int, typer.Option(min=1, help="number of images to use from each split")
    ] = 16,
) -> None:
    """Run one tiny trial in this process, without Ray, so that breakpoints work."""
    from study.commands.trial import try_trial

    try_trial(study, images)


@app.command()
def bench(
    study: Annotated[
        Path | None,
        typer.Argument(
            metavar="[STUDY.yaml]",
            help="study whose trial is timed; default: a tiny model on 64-pixel images",
        ),
    ] = None,
    strategies: Annotated[str, typer.Option(help="comma-separated names, or all")] = "all",
    sizes: Annotated[str, typer.Option(help="of the encoder, with commas: nano,tiny")] = "",
    patches: Annotated[str, typer.Option(help="edges of patches, with commas: 4,8,16")] = "",
    ratios: Annotated[str, typer.Option(help="shares hidden, with commas: 0.25,0.75")] = "",
    precisions: Annotated[str, typer.Option(help="with commas: fp32,bf16")] = "",
    beside: Annotated[
        str, typer.Option(help="libraries to compare with, if installed: timm,monai,lightly")
    ] = "",
    seconds: Annotated[float, typer.Option(min=0, help="how long to time each kind of step")] = 2.0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; default: the study's cpus_per_worker")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file to write as well")
    ] = None,
    search: Annotated[
        str,
        typer.Option(
            help="play studies instead: ways to search with commas, as in tpe+halving,ray, or all"
        ),
    ] = "",
    landscapes: Annotated[str, typer.Option(help="to search on, with commas, or all")] = "all",
    studies: Annotated[int, typer.Option(min=2, help="played of each way to search")] = 30,
    at_once: Annotated[int, typer.Option(min=1, help="trials of a played study at once")] = 4,
) -> None:
    """Time one training step under each masking strategy and beside other libraries.

    Steps of one table take turns, so that their ratios hold on a busy machine too. Of other
    libraries' steps hidden patches and batch are equal; compare parameters and losses before times.
    With --search nothing is timed: studies are played on recorded trials, in minutes.
    """
    if search:
        from study.commands.search_bench import bench_search

        bench_search(search, landscapes, studies=studies, workers=at_once, output=output)
        return
    from study.commands.bench import Grid, bench

    bench(
        study,
        names=strategies,
        grid=Grid(sizes, patches, ratios, precisions),
        beside=beside,
        seconds=seconds,
        threads=threads,
        output=output,
    )


@app.command()
def masks(
    study: StudyFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write")] = Path(
        "masks.html"
    ),
    images: Annotated[int, typer.Option(min=1, max=16, help="number of validation images")] = 4,
    steps: Annotated[
        int, typer.Option(min=4, help="training steps for the model that some strategies consult")
    ] = 60,
    every: Annotated[
        bool, typer.Option("--all", help="show every strategy, not only those in the study")
    ] = False,
) -> None:
    """Draw what each masking in the study hides of your images: one HTML file, no cluster."""
    from analysis.atlas import build_atlas
    from study.commands.masks import show_masks

    show_masks(study, output, images=images, steps=steps, every=every, write_page=build_atlas)


@app.command()
def run(
    study: StudyFile,
    report: Annotated[bool, typer.Option(help="write the report when the run ends")] = True,
) -> None:
    """Run a study, or resume it where it stopped: here, or on the cluster at $RAY_ADDRESS."""
    from study.commands.run import run_study

    raise typer.Exit(run_study(study, build_report=_build_report if report else None))


@app.command()
def submit(
    study: StudyFile,
    address: Annotated[str, typer.Option(help="URL of the cluster's dashboard")],
    storage: Annotated[
        str | None,
        typer.Option(help="a folder that every node can see, or a URI such as s3://bucket/prefix"),
    ] = None,
) -> None:
    """Run a study as a Ray job; prints its id, a link to it, and how to resume it."""
    from study.commands.jobs import submit_study

    submit_study(study, address, storage)


@app.command()
def resume(name: Name, address: Address = None, storage: Storage = None) -> None:
    """Resume a study by name, on this machine or as a new job on the cluster at --address."""
    if address:
        from study.commands.jobs import resume_job

        resume_job(name, address, storage)
    else:
        from study.commands.run import resume_study

        raise typer.Exit(resume_study(name, storage, build_report=_build_report))


@app.command()
def stop(name: Name, address: Address = None, storage: Storage = None) -> None:
    """Ask a running study to stop. Nothing is lost, and it can be resumed."""
    if address:
        from study.commands.jobs import stop_job

        stop_job(name, address, storage)
    else:
        from study.commands.ask import ask_to_stop

        ask_to_stop(name, storage)


@app.command()
def extend(
    name: Name,
    trials: Annotated[int | None, typer.Option(help="how many trials to add")] = None,
    device_hours: Annotated[
        float | None, typer.Option(help="or hours of workers, of a budget in them")
    ] = None,
    wall_hours: Annotated[
        float | None, typer.Option(help="or hours of wall time, of a budget in them")
    ] = None,
    flops: Annotated[
        float | None, typer.Option(help="or operations of training, of a budget in them")
    ] = None,
    storage: Storage = None,
) -> None:
    """Add to the budget of a study for more searched trials, while it is running or later."""
    from study.commands.ask import ask_for_more

    asked = {"device_hours": device_hours, "wall_hours": wall_hours, "flops": flops}
    ask_for_more(name, {"trials": trials, **asked}, storage)


@app.command()
def enqueue(
    name: Name,
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PATH=VALUE]...",
            help="values of searched settings; the rest stay as in `trial`",
        ),
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="read the settings from a YAML file of `path: value` lines")
    ] = None,
    other: Annotated[
        str | None,
        typer.Option("--from", metavar="STUDY", help="the best arms of another study instead"),
    ] = None,
    best: Annotated[int, typer.Option(min=1, help="how many of them")] = 3,
    storage: Storage = None,
) -> None:
    """Have a study try an arm next, with all seeds, while it is running or later."""
    from study.commands.ask import ask_for_arm, ask_for_best_of

    if other is None:
        ask_for_arm(name, settings or [], file, storage)
    elif settings or file:
        raise UserError("given --from and settings as well; expected one of them")
    else:
        ask_for_best_of(name, other, best, storage)


@app.command()
def logs(
    name: Name,
    address: Annotated[str, typer.Option(help="URL of the cluster's dashboard")],
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="keep printing until the job ends")
    ] = False,
) -> None:
    """Print the log of a study's latest job on a cluster."""
    from study.commands.jobs import print_log

    print_log(name, address, follow=follow)


@app.command()
def status(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]")] = None,
    address: Address = None,
    storage: Storage = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="keep refreshing until it ends")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, for programs")] = False,
) -> None:
    """Show where a study stands; without a name, every study in the storage or on the cluster."""
    if follow and as_json:
        raise UserError("--follow and --json exclude each other; leave one out")
    if address:
        from study.commands.jobs import show_jobs

        show_jobs(name, address, as_json=as_json)
    else:
        from study.commands.status import show_status

        show_status(name, storage, follow=follow, as_json=as_json)


@app.command()
def report(
    name: Name,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML file to write")
    ] = None,
    storage: Storage = None,
) -> None:
    """Write the interactive report: one HTML file that works offline."""
    from analysis.report import build_report
    from study import mirror
    from study.commands.finding import find_study

    folder = find_study(name, storage)
    mirror.pull_pictures(folder)
    typer.echo(build_report(folder.root, output))


@app.command()
def export(
    name: Name,
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to create")] = Path(
        "encoder"
    ),
    arm: Annotated[
        str | None, typer.Option(help="id of the arm; default: the best searched arm")
    ] = None,
    optuna: Annotated[
        str | None,
        typer.Option(
            metavar="STORAGE",
            help="copy the trials into a storage of Optuna's instead, for optuna-dashboard: a URL "
            "such as sqlite:///optuna.db, or a file for a journal; again: what is new",
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="with --optuna: go on until the study is over")
    ] = False,
    storage: Storage = None,
) -> None:
    """Copy a pretrained encoder out of a study, as safetensors and JSON that timm can load."""
    if optuna is not None:
        from study.commands.optuna_copy import copy_trials

        copy_trials(name, optuna, storage, follow=follow)
        return
    if follow:
        raise UserError("given --follow without --optuna; an encoder is copied once")
    from study.commands.export import copy_encoder

    copy_encoder(name, output, arm, storage)


@app.command()
def doctor(address: Address = None, storage: Storage = None) -> None:
    """Check whether this machine, or the cluster at --address, is fit and safe for studies."""
    from study.commands.doctor import show_verdicts

    raise typer.Exit(show_verdicts(address, storage))


@app.command()
def console(
    storage: Storage = None,
    address: Address = None,
    host: Annotated[
        str, typer.Option(help="address to listen on; anything but this machine needs token mode")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="port to listen on; 0: any free port")
    ] = 8000,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="allow it to resume, stop, extend and enqueue")
    ] = False,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="another host name under which it may be reached")
    ] = None,
) -> None:
    """Show all studies of a storage in the browser, served by the cluster at --address or here."""
    from study.commands.finding import storage_of
    from study.console.server import start

    start(
        storage_of(storage),
        address=address,
        host=host,
        port=port,
        allow_changes=allow_changes,
        allow_hosts=allow_host or [],
        say=lambda line: print(line, flush=True),
    )


@app.command()
def schema() -> None:
    """Print the JSON Schema of study files, for use in editors."""
    from study.spec import schema as study_schema

    typer.echo(json.dumps(study_schema(), indent=2))


def _build_sheet(dataset: Dataset, study: str, output: Path) -> Path:
    from analysis.sheet import build_sheet

    return build_sheet(dataset, study, output)


def _detectable_difference(seeds: int) -> float | None:
    from analysis.statistics import FEWEST_SEEDS, detectable_difference

    return detectable_difference(1.0, seeds) if seeds >= FEWEST_SEEDS else None


def _build_report(folder: Path) -> Path:
    from analysis.report import build_report

    return build_report(folder)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: errors that users can fix become one message and an exit code."""
    try:
        app(args=arguments, standalone_mode=True)
    except (UserError, StorageError, ClusterError) as error:
        print(f"maskstudy: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted; nothing is lost: run the same command again to resume", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
