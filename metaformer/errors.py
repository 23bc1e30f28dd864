"""Wrong input ends in one clear sentence and exit status 2, a machine that fails in one and 1: never in a traceback."""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from types import TracebackType


class InputError(ValueError):
    """Something the user gave is wrong. The message is one sentence that names it and the mend."""


class MachineError(RuntimeError):
    """The machine has failed, whatever the input. The message is one sentence that says what was lost and the mend."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the known name most like ``name``, or an empty string."""
    match = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {match[0]!r}?)" if match else ""


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's ``main`` and exit with its status; an ``InputError`` prints its sentence and exits with 2.

    A ``MachineError`` does so with 1, as anything else does with a traceback.

    ``METAFORMER_TRACEBACK=1`` shows the traceback as well. Under torchrun the failure goes to its error file, so that
    the launcher can report the first failure of many workers once.
    """
    try:
        sys.exit(main() or 0)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if os.environ.get("TORCHELASTIC_ERROR_FILE"):
            report_to_torchrun(error)
        elif isinstance(error, InputError | MachineError) and not os.environ.get("METAFORMER_TRACEBACK"):
            print(f"error: {error}", file=sys.stderr)
        else:
            traceback.print_exception(error)
        sys.exit(2 if isinstance(error, InputError) else 1)


def exit_on_input_error() -> None:
    """As :func:`run_command`, where the ``main`` is not ours: an uncaught ``InputError`` prints its sentence."""
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        wrong_input = isinstance(error, InputError)
        if wrong_input and not os.environ.get("METAFORMER_TRACEBACK"):
            print(f"error: {as_raised(error)}", file=sys.stderr)
        else:
            previous(kind, error, trace)
        if wrong_input:
            sys.exit(2)

    sys.excepthook = hook


def as_raised(error: InputError) -> str:
    """The sentence itself: registries raise their own around it, loaders put their worker's traceback before it."""
    while isinstance(inner := error.__cause__ or error.__context__, InputError):
        error = inner
    return str(error).rpartition("InputError: ")[2].strip()


def report_to_torchrun(error: Exception) -> None:
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    handler = get_error_handler()
    handler.initialize()
    handler.record_exception(error)
