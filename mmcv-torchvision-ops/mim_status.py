"""The ``mim`` command of openmim 0.3.9, with errors in one line and the right exit status.

openmim lets the exception of a failed run, or of wrong arguments, end in its own traceback and status 1, whatever the
run's status and after the run has already printed its error. It parses its arguments with a copy of an old click's
code: with click 8.3 or later every option that is not given arrives as a placeholder instead of None, and Slurm fails
on it. What mmengine refuses without a GPU it refuses by an assertion, far into the run.
"""

import os
import shlex
import subprocess
import sys
import warnings


def main() -> None:
    os.environ.setdefault("METAFORMER_COMMAND", shlex.join(["mim", *sys.argv[1:]]))
    warnings.filterwarnings("ignore", "pkg_resources is deprecated")  # mim's, three times before each error
    import click
    from mim.cli import cli
    from mim.click import CustomCommand

    if {"--amp", "pytorch", "--launcher=pytorch"} & set(sys.argv):
        import torch

        if not torch.cuda.is_available():
            print("error: --amp and --launcher pytorch need a GPU, and there is none: leave them out", file=sys.stderr)
            sys.exit(2)

    def parse_args(self: CustomCommand, context: click.Context, arguments: list[str]) -> list[str]:
        self.raw_args = [argument for argument in arguments if argument not in ("-h", "--help")]
        return click.Command.parse_args(self, context, arguments)

    CustomCommand.parse_args = parse_args
    try:
        cli()
    except subprocess.CalledProcessError as error:  # the run has printed why
        sys.exit(error.returncode if error.returncode >= 0 else 128 - error.returncode)
    except (ValueError, AssertionError) as error:  # unknown package or config, missing Slurm options
        print(f"error: {click.unstyle(str(error))}", file=sys.stderr)
        sys.exit(2)
