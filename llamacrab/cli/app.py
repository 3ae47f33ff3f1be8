"""The command line: `llamacrab embed | rerank | search | info | tune | fetch | convert ...`."""

from __future__ import annotations

import logging
import os
import sys
import warnings

import click

from llamacrab._support.versions import __version__, show_versions
from llamacrab.cli import bench, embed, models, rerank, search, tune
from llamacrab.cli.messages import complain
from llamacrab.errors import LlamaError


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code. An error is one line on standard error."""
    warnings.showwarning = _show_warning
    logging.getLogger("llamacrab.diagnostics").addHandler(_LOG_HANDLER)
    try:
        # Without arguments, show the help.
        arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
        return main(arguments, prog_name="llamacrab", standalone_mode=False) or 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.UsageError as error:
        return complain(error.format_message(), 2)
    except BrokenPipeError:  # the reader of the output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (click.ClickException, LlamaError, OSError, ValueError) as error:
        return complain(str(error), 1)
    except (click.Abort, KeyboardInterrupt):
        return complain("interrupted", 130)


class _LogHandler(logging.Handler):
    """Shows warnings about a model on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        complain(f"warning: {record.getMessage()}", 0)


_LOG_HANDLER = _LogHandler()


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    complain(f"warning: {message}", 0)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="llamacrab %(version)s")
def main() -> None:
    """Embedding and reranking with GGUF models."""


for command in (
    embed.embed,
    rerank.rerank,
    search.search,
    models.info,
    models.fetch,
    models.convert_command,
    tune.tune_command,
    bench.bench_command,
):
    main.add_command(command)


@main.command()
def versions() -> None:
    """Show versions and build options, for a bug report."""
    show_versions()
