"""The command line: argument parsing, flag files, and the exit status of every command."""
import argparse
import contextlib
import math
import multiprocessing
import os
import shlex
import signal
import sys
import traceback

from core.errors import InputError, as_one_line, explain_error


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
        return shlex.split(line, comments=True)

    def parse_known_args(self, args=None, namespace=None):
        try:
            return super().parse_known_args(args, namespace)
        except InputError:
            raise
        except (ValueError, RecursionError) as error:
            raise InputError(f"a flag file cannot be read ({as_one_line(error)}); expected one "
                             f"flag per line") from None

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
    """Return the list of arguments that sets a flag to a value: ["--resize", "384", "288"]."""
    if value is None:
        return [f"no --{name}"]
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]


def run_cli(main):
    """Run `main` and end the process.

    The exit status is 0, or 2 with one line on stderr for an error that the user can fix, or 1
    with a traceback for a bug.

    Loader processes ignore SIGTERM and may hold locks of the queues they share with this process.
    They are killed and this process ends at once, so that nothing waits for such a lock.
    """
    status = 1
    try:
        main()
        status = 0
    except SystemExit as error:
        status = error.code or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    except Exception as error:
        line = explain_error(error)
        if line is None:
            traceback.print_exc()
        else:
            print(f"error: {line}", file=sys.stderr)
            status = 2
    if hasattr(signal, "SIGCHLD"):  # torch's handler would raise an error for killed processes
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        child.kill()
    multiprocessing.util._run_finalizers(0)  # releases semaphores
    with contextlib.suppress(OSError):  # a closed pipe
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
