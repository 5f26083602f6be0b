"""Typed options: reads a frozen dataclass from TOML and JSON tables, `--set key=value` pairs and command lines.

    @dataclass(frozen=True)
    class Size:
        height: int = option(480, "pixels")
        width: int = option(832, "pixels")

    read(Size, {"height": 32}, "size")      # from a table; unknown keys and wrong types raise ValueError
    add_options(parser, Size)               # --height INT, --width INT
    options_of(parser.parse_args(), Size)   # Size(...)

Only the class defines a field's type, default and help text.
"""

import argparse
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, cast, get_args, get_origin, get_type_hints

from engine.files import MOST_DEPTH, is_shallow, read_text

Options = TypeVar("Options")


class FieldError(ValueError):
    """A refused field of a table; an empty name is the table itself."""

    def __init__(self, text: str, field: str, got: str, expected: str) -> None:
        super().__init__(text)
        self.field, self.got, self.expected = field, got, expected


def option(
    default: Any = MISSING, help: str = "", *, metavar: str | tuple[str, ...] | None = None,
    choices: Iterable[str] | None = None, exclusive: str = "", positional: bool = False,
) -> Any:  # fmt: skip
    """A dataclass field with its `--help` text. Without a default the option is required.

    choices     allowed values of a text, or of each text of a tuple; a Literal type needs none
    exclusive   options that share this word exclude each other
    positional  the command line takes the value without --NAME
    """
    about = {"help": help, "metavar": metavar, "choices": tuple(choices) if choices else None, "exclusive": exclusive}
    return field(default=default, metadata=about | {"positional": positional})


def read(kind: type[Options], values: Mapping[str, Any], what: str) -> Options:
    """Make an instance from a TOML, JSON or Python mapping. ValueError names `what`, the key, got and expected."""
    names = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(names)):
        raise _refused(what, "", f"unknown key {', '.join(unknown)[:200]}", f"one of {', '.join(names)}")
    hints = get_type_hints(kind, include_extras=True)
    about = {f.name: f.metadata for f in fields(kind)}  # type: ignore[arg-type]
    typed = {}
    for name, value in values.items():
        typed[name] = _typed(hints[name], value, what, name)
        choices, got = about[name].get("choices"), typed[name]
        if choices and not all(one in choices for one in (got if isinstance(got, tuple) else [got])):
            raise _refused(what, name, repr(value), f"one of {', '.join(choices)}")
    required = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]  # type: ignore[arg-type]
    if missing := [name for name in required if name not in typed]:
        raise _refused(what, "", f"no {missing[0]}", "it")
    return kind(**typed)


def replaced(options: Options, values: Mapping[str, Any], what: str) -> Options:
    """Replace some fields of the options, all at once, by values as `read` takes them. ValueError as `read`."""
    return read(type(options), asdict(options) | dict(values), what)  # type: ignore[call-overload]


def read_table(kind: type[Options], path: Path, table: str, values: Mapping[str, Any] | None = None) -> Options:
    """Make an instance from one table of a TOML file; `values` replace its entries. ValueError as `read`."""
    tables = read_toml(path)
    if table not in tables:
        raise ValueError(f"{path}: got tables {', '.join(sorted(tables)) or 'none'}, expected [{table}]")
    return read(kind, tables[table] | dict(values or {}), f"{path} [{table}]")


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file's content. FileNotFoundError or ValueError names the file."""
    if not os.path.lexists(path):
        raise FileNotFoundError(f"config: got {path}, expected an existing TOML file")
    text = read_text(path)
    try:
        values = tomllib.loads(text)
    except ValueError as error:  # also of int(), for thousands of digits
        raise ValueError(f"config: got {path}, expected TOML ({error})") from None
    except RecursionError:
        values = None
    if values is None or not is_shallow(values):
        raise ValueError(f"config: got {path}, expected TOML of at most {MOST_DEPTH} levels")
    return values


def pairs(texts: Iterable[str]) -> dict[str, Any]:
    """Parse `key=value` texts to a mapping. A value that is not TOML stays a text. ValueError without key or `=`."""
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--set: got {text!r}, expected key=value")
        try:
            found[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            found[key.strip()] = value.strip()
    return found


def whole_number(text: str) -> int:
    """A sign and ASCII digits as an integer, as greedy-host reads it. ValueError for another text."""
    if not re.fullmatch(r"[-+]?[0-9]+", text):
        raise ValueError(f"got {text!r}, expected an integer")
    return int(text)


def real_number(text: str) -> float:
    """A finite decimal number in ASCII, such as -1, .5 or 1e3. ValueError for another text."""
    number = r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?"
    if not re.fullmatch(number, text) or not isfinite(float(text)):
        raise ValueError(f"got {text!r}, expected a finite number")
    return float(text)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with one-line errors and a help that keeps line breaks."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        """Print one line instead of argparse's usage and message, and exit with status 2."""
        if re.search(r"expected (one|\d+) arguments?$", message):
            message += "; a value that begins with - is written --NAME=-value, a file's name also ./-name"
        self.exit(2, f"error: {' '.join(message.split())} (see --help)\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        """As argparse, but help that stdout does not take is an error."""
        file = file or sys.stderr
        try:
            if file is not None:
                print(message, end="", file=file, flush=True)
        except (OSError, ValueError) as error:
            if file is not sys.stdout:
                return
            with suppress(OSError, ValueError):
                file.close()  # nothing is left to flush at exit
            if not isinstance(error, BrokenPipeError):
                self.exit(1, f"error: help: got {error} on stdout, expected it to be written\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Take what follows an option of one value as its value although it begins with one -, as in --image -x.png."""
        given = list(sys.argv[1:] if args is None else args)
        known, joined = self._option_string_actions, []
        while given:
            one = given.pop(0)
            option = known.get(one)
            takes_one = option is not None and option.nargs is None and option.option_strings and one.startswith("--")
            if takes_one and given and re.match(r"-[^-]", given[0]) and given[0] not in known:
                one = f"{one}={given.pop(0)}"
            joined.append(one)
        return super().parse_known_args(joined, namespace)


def add_options(
    parser: argparse.ArgumentParser, kind: type, title: str = "", *, skip: Iterable[str] = (), defaults: bool = True
) -> None:
    """Add one command-line option per field of a dataclass; a title puts them into their own group.

    defaults: show each field's default in the help. Pass False if another place chooses the defaults.
    """
    where: Any = parser.add_argument_group(title) if title else parser
    hints, skipped = get_type_hints(kind, include_extras=True), set(skip)
    exclusive: dict[str, Any] = {}
    for f in fields(kind):
        if f.name in skipped:
            continue
        key, group = f.metadata.get("exclusive"), where
        if key:
            group = exclusive[key] = exclusive.get(key) or where.add_mutually_exclusive_group()
        group.add_argument(_spelled(f), **_argument(f, hints[f.name], defaults))


def chosen(args: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The fields of a dataclass that the user set on the command line."""
    return {f.name: getattr(args, f.name) for f in fields(kind) if hasattr(args, f.name)}


def options_of(args: argparse.Namespace, kind: type[Options]) -> Options:
    """Make the dataclass from a parsed command line. Options that the user did not set keep their defaults."""
    return kind(**chosen(args, kind))


def command_line(options: Any) -> list[str]:
    """The command-line arguments that `options_of` reads as these options. Omits defaults."""
    found: list[str] = []
    for f in fields(options):
        name, value = _spelled(f), getattr(options, f.name)
        if value is None or value == f.default:
            continue
        if f.metadata.get("positional"):
            found.append(str(value))
        elif isinstance(value, bool):
            found.append(name if value else name.replace("--", "--no-", 1))
        else:
            for one in value if isinstance(value, tuple) else [value]:
                found += [name, *map(str, one if isinstance(one, tuple) else [one])]
    return found


def _spelled(f: "Field[Any]") -> str:
    """A field's name on the command line."""
    return f.name if f.metadata.get("positional") else "--" + f.name.replace("_", "-")


@dataclass(frozen=True)
class Convert:
    """In Annotated[type, Convert(function)]: what a table or a command line holds goes through `function` first."""

    function: Callable[[Any], Any]


class _Unfit(ValueError):
    """A value of another type than the one that its text names."""


def _refused(what: str, field: str, got: str, expected: str) -> FieldError:
    return FieldError(f"{what}: {field and f'{field}: '}got {got}, expected {expected}", field, got, expected)


def _typed(hint: Any, value: Any, what: str, name: str) -> Any:
    """Convert a plain value to a field's type: lists to tuples, texts to paths, but no texts to numbers."""
    try:
        return _fitted(hint, value)
    except _Unfit as expected:
        raise _refused(what, name, shown(value), str(expected)) from None
    except FieldError as error:  # of a table inside, which the message names
        field = error.field if error.field.startswith(f"{name}.") else name
        raise FieldError(f"{what}: {error}", field, error.got, error.expected) from None
    except ValueError as error:  # of the field's own converter, whose message is complete
        raise FieldError(f"{what}: {name}: {error}", name, shown(value), "another") from None


def shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


_EXACT: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "a valid boolean"), int: ((int,), "a valid integer"), float: ((int, float), "a valid number"),
    str: ((str,), "a valid string"), Path: ((str, type(Path())), "a valid path"),
}  # fmt: skip


def _fitted(hint: Any, value: Any) -> Any:
    """The value as `hint` has it. _Unfit, with the words for what was expected, where its type is another."""
    if _annotated(hint):
        for part in hint.__metadata__:
            value = part.function(value) if isinstance(part, Convert) else value
        return _fitted(get_args(hint)[0], value)
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if hint in _EXACT:  # True is an int, but no integer
        kinds, words = _EXACT[hint]
        if type(value) not in kinds:
            raise _Unfit(words)
        try:
            return hint(value)
        except OverflowError:  # an integer that no float holds
            raise _Unfit("a number in range") from None
    if origin is Literal:
        if not any(value == one and type(value) is type(one) for one in parts):
            raise _Unfit(" or ".join(map(repr, parts)))
        return value
    if type(None) in parts:
        return None if value is None else _fitted(next(p for p in parts if p is not type(None)), value)
    if origin is dict or is_dataclass(hint):
        kind = cast(type, hint)
        if is_dataclass(hint) and isinstance(value, kind):
            return value
        if not isinstance(value, dict):
            raise _Unfit("a table")
        return read(kind, value, kind.__name__.lower()) if is_dataclass(hint) else dict(value)
    if not isinstance(value, list | tuple):
        raise _Unfit("a list")
    kinds_of = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
    if len(kinds_of) != len(value):
        raise _Unfit(f"{len(parts)} values")
    return tuple(_fitted(kind, one) for kind, one in zip(kinds_of, value, strict=True))


def _argument(f: "Field[Any]", hint: Any, defaults: bool) -> dict[str, Any]:
    """The arguments of add_argument for one field."""
    about, default = f.metadata, f.default
    help = about.get("help", "")
    if defaults and not any(default is empty for empty in (None, MISSING, (), "", False, True)):
        help = f"{help} ({default})".strip()
    arguments: dict[str, Any] = {"help": help.replace("%", "%%"), "default": argparse.SUPPRESS}
    required = default is MISSING and f.default_factory is MISSING
    if f.metadata.get("positional"):
        # Python 3.11 would check SUPPRESS against the choices.
        arguments = {"help": arguments["help"]} | ({} if required else {"nargs": "?", "default": default})
    elif required:
        arguments["required"] = True
    core = _core(hint)
    if core is bool:
        return arguments | {"action": "store_true" if default is False else argparse.BooleanOptionalAction}
    choices = get_args(core) if get_origin(core) is Literal else about.get("choices")
    if choices:
        several = {"action": _Append} if get_origin(core) is tuple else {}
        return arguments | several | {"choices": choices}
    metavar = about.get("metavar")
    if get_origin(core) is tuple and not _annotated(hint):  # repeated options, or one value per place
        inner = get_args(core)[0]
        arguments["action"] = _Append
        if get_origin(inner) is tuple:
            arguments["nargs"], inner = len(get_args(inner)), get_args(inner)[0]
        return arguments | {"type": _reader(inner), "metavar": metavar or "VALUE"}
    return arguments | {"type": _reader(hint), "metavar": metavar or getattr(core, "__name__", "value").upper()}


class _Append(argparse.Action):
    """Collects repeated options in one tuple."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        one = tuple(values) if isinstance(values, list) else values
        setattr(namespace, self.dest, (*getattr(namespace, self.dest, ()), one))


def _core(hint: Any) -> Any:
    """The type inside Annotated and `| None`."""
    if _annotated(hint):
        return _core(get_args(hint)[0])
    options = [part for part in get_args(hint) if part is not type(None)]
    if type(None) in get_args(hint) and len(options) == 1:
        return _core(options[0])
    return hint


def _annotated(hint: Any) -> bool:
    return hasattr(hint, "__metadata__")


def _reader(hint: Any) -> Any:
    """The function with which argparse converts an option's text."""
    core = _core(hint)

    def convert(text: str) -> Any:
        value: Any = text
        if core is not Path and not text.isprintable() and any("\ud800" <= one <= "\udfff" for one in text):
            shown = text.encode("utf-8", "backslashreplace").decode()
            raise argparse.ArgumentTypeError(f"got '{shown}', expected text in UTF-8")
        if core in (int, float):
            with suppress(ValueError):
                value = (whole_number if core is int else real_number)(text)
        try:
            return _fitted(hint, value)
        except _Unfit as expected:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}") from None
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert
