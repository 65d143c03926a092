"""curvkit completion: the script that lets a shell complete commands, options and paths."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

SHELLS = {
    "bash": 'eval "$(curvkit completion bash)"     in ~/.bashrc',
    "zsh": 'eval "$(curvkit completion zsh)"      in ~/.zshrc',
    "fish": "curvkit completion fish | source      in ~/.config/fish/config.fish",
}
"""What turns it on, and where that line goes."""


@click.command(
    help="Print the completion script of a SHELL.\n\n\b\nTo turn it on, add a line to what the shell reads when it starts:\n"
    + "\n".join(SHELLS.values())
)
@click.argument("shell", type=click.Choice(list(SHELLS)))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> int:
    root = ctx.find_root()
    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"this version of click has no completion for {shell}. Update it: pip install -U click.")
    name = root.info_name or "curvkit"
    click.echo(kind(root.command, {}, name, f"_{name.replace('-', '_').upper()}_COMPLETE").source())
    return 0
