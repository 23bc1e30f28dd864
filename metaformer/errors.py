"""Error classes for invalid input and machine failures, and the exit status of commands.

Invalid input prints a one-line error and exits with status 2; machine failures do the same with status 1. All other
exceptions print a traceback and exit with status 1.
"""

import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from types import TracebackType


class InputError(ValueError):
    """Invalid input from the user. The message is one sentence that names the input and the remedy."""


class MachineError(RuntimeError):
    """A failure of the machine with valid input. The message is one sentence that names the loss and the remedy."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns ``" (did you mean 'x'?)"`` for the entry of ``known`` closest to ``name``, or an empty string."""
    match = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {match[0]!r}?)" if match else ""


def check_known(kind: str, name: str, known: Iterable[str]) -> None:
    """Raises an ``InputError`` that lists all names of this kind if ``name`` is not one of ``known``."""
    if name not in known:
        raise InputError(f"there is no {kind} {name!r}{nearest(name, known)}: there are {', '.join(known)}")


@contextmanager
def explained(says: str) -> Iterator[None]:
    """Turns an error of any other kind in the block into an ``InputError``: ``says``, and the error in one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{says}: {textwrap.shorten(f'{type(error).__name__}: {error}', 300)}") from error


def run_command(main: Callable[[], int | None]) -> None:
    """Runs the ``main`` function of a command and exits with the status that it returns.

    An :class:`InputError` exits with status 2 and a :class:`MachineError` with status 1; both print their message only,
    unless ``METAFORMER_TRACEBACK=1`` is set. Under torchrun the error is written to torchrun's error file instead, so
    that the launcher reports the first failure of many workers once.
    """
    try:
        status = main() or 0
        sys.stdout.flush()  # raises BrokenPipeError here and not at the interpreter's exit
        sys.exit(status)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        if os.environ.get("TORCHELASTIC_ERROR_FILE"):
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            get_error_handler().record_exception(error)
        elif isinstance(error, InputError | MachineError) and not os.environ.get("METAFORMER_TRACEBACK"):
            print(f"error: {error}", file=sys.stderr)
        else:
            traceback.print_exception(error)
        sys.exit(2 if isinstance(error, InputError) else 1)


def exit_on_input_error() -> None:
    """Installs :func:`run_command`'s treatment of an uncaught ``InputError`` in programs that are not ours."""
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, InputError):
            return previous(kind, error, trace)
        traced = os.environ.get("METAFORMER_TRACEBACK")
        says = "".join(traceback.format_exception(error)) if traced else f"error: {as_raised(error)}\n"
        # init_process_group puts a hook around this one. It replaces sys.stderr, and would lose what is written there,
        # because this hook ends with an exception.
        print(says, end="", file=sys.__stderr__, flush=True)
        sys.exit(2)

    sys.excepthook = hook


def as_raised(error: InputError) -> str:
    """Returns the original message; registries wrap it in their own, and data loaders put a traceback before it."""
    while isinstance(inner := error.__cause__ or error.__context__, InputError):
        error = inner
    return str(error).rpartition("InputError: ")[2].strip()
