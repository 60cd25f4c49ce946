"""The `aif` command. A verb imports its stage when it runs, so that `aif --help` stays quick."""

from __future__ import annotations

import typer

from aif.cli.audit import audit_app
from aif.cli.batches import batches_app
from aif.cli.constitution import constitution_app
from aif.cli.diff import diff_app
from aif.cli.evaluate import evaluate_app
from aif.cli.label import label_app
from aif.cli.options import EPILOG
from aif.cli.report import report_app
from aif.cli.revise import revise_app
from aif.cli.run import run_app
from aif.cli.sample import sample_app
from aif.cli.train import train_app

app = typer.Typer(
    help="Label preferences with an LLM judge under a constitution you edit.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for group in (
    label_app, sample_app, revise_app, train_app, audit_app, diff_app, evaluate_app, report_app,
    run_app, batches_app,
):  # fmt: skip
    app.add_typer(group)
app.add_typer(constitution_app, name="constitution")


def main() -> None:
    """The `aif` command."""
    app()
