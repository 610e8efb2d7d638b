"""The command line: flags, flag files, printed commands, and the exit status of every command."""
import argparse
import functools
import io
import logging
import math
import multiprocessing.util
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import traceback
from pathlib import Path

from core.errors import InputError, as_one_line, explain_error

ROOT = Path(__file__).resolve().parent.parent
STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP"):  # a terminal that is closed; not on Windows
    STOP_SIGNALS.append(signal.SIGHUP)
# Matches quoted or escaped text, which is kept, or a comment.
COMMENT = re.compile(r"""('[^']*'|"(?:\\.|[^"\\])*"|\\.)|(?<!\S)#.*""")
log = logging.getLogger("mask")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        # A default of None, False or 0 is not shown; such flags describe it in their help.
        return super()._get_help_string(action) if action.default else action.help


class ArgumentParser(argparse.ArgumentParser):
    """argparse with one-line errors, no abbreviated flags, and flags read from `@FILE`.

    A flag file holds one flag per line, with its values; `#` starts a comment.
    """

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter,
                         fromfile_prefix_chars="@", **kwargs)

    def convert_arg_line_to_args(self, line):
        # As in a shell, "#" inside a word is part of it. Editors on Windows write a BOM.
        return shlex.split(COMMENT.sub(lambda found: found[1] or "", line.removeprefix("\ufeff")))

    def parse_known_args(self, args=None, namespace=None):
        try:
            namespace, others = super().parse_known_args(args, namespace)
        except InputError:
            raise
        except (ValueError, RecursionError) as error:
            raise InputError(f"a flag file cannot be read ({as_one_line(error)}); expected one "
                             f"flag per line") from None
        # An unset shell variable gives an empty path; a shell does not expand ~ after "=".
        for action in self._actions:
            value = getattr(namespace, action.dest, None)
            if any(isinstance(item, str) and not item.strip()
                   for item in (value if isinstance(value, list) else [value])):
                raise InputError(str(argparse.ArgumentError(action, "is empty; pass a value")))
            if isinstance(value, str):
                setattr(namespace, action.dest, os.path.expanduser(value))
            elif isinstance(value, list) and isinstance(value[0], str):
                setattr(namespace, action.dest, [os.path.expanduser(item) for item in value])
        return namespace, others

    def error(self, message):
        raise InputError(f"{message} (see {self.prog} --help)")

    def add_machine_flags(self):
        """Add the flags about the machine that training and inference share."""
        add = self.add_argument_group("machine").add_argument
        add("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu")
        add("--amp", action=argparse.BooleanOptionalAction,
            help="mixed precision (default: on CUDA only; inference: as in training)")
        add("--num_workers", type=in_range(int, -1), default=-1,
            help="loader processes (-1 = up to 8 on a GPU, none on the CPU)")
        add("--valid_batch_size", type=in_range(int, 1), default=64,
            help="photos per batch in evaluation and inference, in each process")

    def parse_explicit(self, argv=None):
        """Parse once; return (args, names of the flags that were given on the command line)."""
        unset = object()
        defaults = {action.dest: action.default for action in self._actions
                    if action.dest != "help"}
        # argparse fills in a default only where the namespace has no such attribute yet.
        args = self.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, unset)))
        explicit = {name for name, value in vars(args).items() if value is not unset}
        for name in defaults.keys() - explicit:
            setattr(args, name, defaults[name])
        return args, explicit


def in_range(kind, low, high=math.inf, including_high=False):
    """Return an argparse `type` for numbers of `kind` (int or float) from `low` to `high`.

    `high` itself is not in the range unless `including_high`.
    """
    def parse(text):
        number = kind(text)
        if not (low <= number < high or (including_high and number == high)):
            limit = f" and {'at most' if including_high else 'below'} {high:g}"
            raise argparse.ArgumentTypeError(f"{text} is out of range; expected at least {low:g}"
                                             f"{limit if high < math.inf else ''}")
        return number
    parse.__name__ = kind.__name__  # argparse names the type in "invalid int value"
    return parse


def format_flag(name, value):
    """Return the list of arguments that sets a flag to a value: ["--resize", "384", "288"].

    None gives ["no --name"], for messages only.
    """
    if value is None:
        return [f"no --{name}"]
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]


def script(name):
    """Return the start of a command line that runs a script or tool from the current folder.

    Args:
        name: "train.py", or "tools.export".
    """
    # "python" may be missing, or of another environment.
    found, own = shutil.which("python"), sys.executable
    is_own = found and os.path.samefile(found, own) and Path(found).parent == Path(own).parent
    python = "python" if is_own else shlex.quote(own)
    try:
        is_here = Path.cwd() == ROOT
    except FileNotFoundError:  # it was deleted
        is_here = False
    if name.endswith(".py"):
        return f"{python} {name if is_here else shlex.quote(str(ROOT / name))}"
    return f"{'' if is_here else f'PYTHONPATH={shlex.quote(str(ROOT))} '}{python} -m {name}"


def restores_process(main):
    """Decorate a command's main: log lines go to stdout while it runs.

    For notebooks: at the end logging, signal handlers, determinism and CUBLAS_WORKSPACE_CONFIG are
    as before.
    """
    @functools.wraps(main)
    def wrapper(argv=None):
        handlers, level, propagate = log.handlers, log.level, log.propagate
        # The only variable that `main` sets (dataset.py sets another one when it is imported).
        cublas = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
        was_deterministic = _is_deterministic()
        on_signal = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        log.handlers, log.propagate = [logging.StreamHandler(sys.stdout)], False
        log.setLevel(logging.INFO)
        try:
            return main(argv)
        finally:
            log.handlers, log.propagate = handlers, propagate
            log.setLevel(level)
            if cublas is None:
                os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
            if _is_deterministic() != was_deterministic:
                sys.modules["torch"].use_deterministic_algorithms(was_deterministic)
            if threading.current_thread() is threading.main_thread():
                for number, handler in on_signal.items():
                    if handler is not None:  # None: set by another program that runs Python
                        signal.signal(number, handler)
    return wrapper


def _is_deterministic():
    torch = sys.modules.get("torch")  # f1.py does not import it
    return bool(torch) and torch.are_deterministic_algorithms_enabled()


class _Output(io.FileIO):
    """A stream that drops what cannot be written: a closed pipe must not stop the work."""

    def write(self, data):
        try:
            written = super().write(data)
        except OSError:
            written = None
        return len(data) if written is None else written  # None: the pipe is full and non-blocking


def _open_outputs():
    """Set sys.stdout and sys.stderr to streams whose writing never fails.

    They use copies of the descriptors: core.images redirects 2 while it decodes a photo, and what
    another thread prints meanwhile (tqdm, TensorBoard) must not be taken for damage of the photo.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed: no other file may get this number, or messages would go there
            os.open(os.devnull, os.O_RDWR)
    for name, number in (("stdout", 1), ("stderr", 2)):
        file = io.BufferedWriter(_Output(os.dup(number), "w", closefd=False))
        encoding = getattr(getattr(sys, name), "encoding", None)
        setattr(sys, name, io.TextIOWrapper(file, encoding, "backslashreplace",
                                            line_buffering=True))


def run_cli(main):
    """Run `main` and end the process.

    The exit status is 0, or 2 with one line on stderr for an error that the user can fix, or 1
    with a traceback for a bug.

    Loader processes ignore SIGTERM and may hold locks of the queues they share with this process.
    They are killed and this process ends at once, so that nothing waits for such a lock.
    """
    _open_outputs()
    try:
        main()
    except BaseException as error:
        # End the process here, while the exception still keeps main's DataLoaders alive. Deleting
        # a DataLoader waits 5 seconds for each loader process that is busy.
        _end_process(_exit_status(error))
    _end_process(0)


def _exit_status(error):
    """Print what the user should see of an exception; return the exit status."""
    if isinstance(error, SystemExit):
        return error.code or 0
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 1
    line = explain_error(error)
    if line is None:
        traceback.print_exception(error)
        return 1
    print(f"error: {line}", file=sys.stderr)
    return 2


def _end_process(status):
    if hasattr(signal, "SIGCHLD"):  # torch's handler would raise an error for killed processes
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        child.kill()
    multiprocessing.util._run_finalizers(0)  # releases semaphores
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
