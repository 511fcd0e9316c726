"""``rollout-core conversation``: what each turn of a conversation added, as a table and as a picture."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

# torch, transformers and matplotlib are imported when the command runs: the help of all commands imports this module.


def conversation_command(
    file: Annotated[
        Path, typer.Argument(help="Messages as JSON, or what Conversation.to_bytes wrote.", metavar="FILE", show_default=False)
    ],
    processor: Annotated[
        Path | None,
        typer.Option(help="A folder that save_pretrained wrote; goes before the one that the file names.", show_default=False),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the turns into this .png, .svg or .pdf.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of the table.")] = False,
) -> None:
    """Show a conversation: each turn's tokens by origin, its pictures, videos and sounds, and what it had to process.

    Nothing is fetched. Exits with 0, or 2 if the conversation cannot be made.
    """
    from rollout_core.errors import RolloutCoreError

    try:
        if plot is not None:
            from rollout_core.viewing.plot import check_ending

            check_ending(plot)
        view = _view(file, processor)
    except ImportError as error:
        _fail(f"{error}; pip install 'rollout-core[cli,hf]'")
    except (RolloutCoreError, OSError) as error:
        _fail(str(error))
    _print(view, as_json)
    if plot is not None:
        from rollout_core.viewing.plot import plot_view

        try:
            plot_view(view, plot, title=file.name)
        except OSError as error:
            _fail(str(error))
        typer.echo(f"plot written to {plot}", err=as_json)


def _view(file: Path, processor: Path | None) -> Any:
    from rollout_core.errors import ConversationError
    from rollout_core.viewing.file import conversation_from, load_processor, placeholders_of, read_file, renderer_of
    from rollout_core.viewing.reading import view_of

    given = read_file(file)
    folder = processor or given.processor
    if folder is None:
        raise ConversationError(f"{file} names no processor; give --processor DIR, a folder that save_pretrained wrote")
    renderer = renderer_of(load_processor(folder), given)
    return view_of(conversation_from(given, renderer), placeholders_of(renderer))


def _print(view: Any, as_json: bool) -> None:
    from rich.console import Console

    from rollout_core.viewing.report import view_json, view_table

    if as_json:
        typer.echo(json.dumps(view_json(view)))
        return
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 160  # in a file or pipe nothing has to fit 80 columns
    console.print(view_table(view))


def _fail(message: str) -> NoReturn:
    """One line on stderr and exit code 2, as for any other wrong argument."""
    from rich.console import Console

    words = " ".join(message.split())
    Console(stderr=True).print(f"error: {words}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(2)
