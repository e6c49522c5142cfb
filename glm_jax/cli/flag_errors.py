"""Messages for wrong flags that say what to give, from absl's."""

import difflib
import itertools
import re

from absl import flags

from glm_jax.cli.help import is_required, own_flags

_OF_A_FLAG = re.compile(r"flag --(?P<name>[\w.]+)=(?P<value>.*?): (?P<said>.*)", re.DOTALL)
_OF_SEVERAL = re.compile(r"flags \w+=.*?: (?P<said>give .*)", re.DOTALL)
_WITHOUT_VALUE = re.compile(r"Missing value for flag (?P<name>\S+)")
_NOT_OF_ITS_KIND = ("invalid literal", "could not convert", "Non-boolean", "value should be")
_KINDS = {"bool": "true or false", "int": "an integer", "float": "a number"}


def explained(error: Exception) -> str:
    """Return a line for an error of parsing a command line."""
    if isinstance(error, flags.UnrecognizedFlagError):
        return _unknown(error.flagname)
    message = str(error)
    without_value = _WITHOUT_VALUE.fullmatch(message)
    if without_value:
        name = without_value["name"].lstrip("-")
        return f"--{name} has no value: give --{name}=VALUE, {_meaning(name)}"
    if not isinstance(error, flags.IllegalFlagValueError):
        return message
    said = [_in_words(line) for line in message.split("\nflag")]
    missing = [name for name, text in said if not text]
    first = [f"missing {_listed([_with_meaning(name) for name in missing])}"] if missing else []
    return "; ".join([*first, *(text for _, text in said if text)])


def require(names: tuple[str, ...], instead: tuple[str, ...]) -> None:
    """Refuse command lines without these flags.

    Args:
      names: required flags; "a|b" requires one of the two.
      instead: flags that each make the others optional.
    """
    choices = [name.split("|") for name in names]

    def check(values: dict[str, object]) -> bool:
        missing = [
            " (or ".join(f"--{name}" for name in either) + ")" * (len(either) - 1)
            for either in choices
            if not any(values[name] for name in either)
        ]
        if not missing or any(values[name] for name in instead):
            return True
        others = "".join(f", or --{name}" for name in instead)
        raise flags.ValidationError(f"give {_listed(missing)}{others}")

    flags.register_multi_flags_validator([*itertools.chain(*choices), *instead], check)


def _in_words(line: str) -> tuple[str, str]:
    """Return a flag's name and message from absl's line; an empty message if it is missing."""
    line = line if line.startswith(("flag", "-")) else f"flag{line}"
    several = _OF_SEVERAL.fullmatch(line)
    if several:
        return "", several["said"]
    match = _OF_A_FLAG.fullmatch(line)
    if match is None:
        return "", line
    name, value, said = match["name"], match["value"], match["said"]
    flag = _flag(name)
    if value == "None" and flag is not None and is_required(flag):
        return name, ""
    if flag is not None and any(words in said for words in _NOT_OF_ITS_KIND):
        choices = getattr(flag.parser, "enum_values", None)
        kind = flag.parser.syntactic_help or _KINDS.get(flag.flag_type(), flag.flag_type())
        kind = f"one of {', '.join(choices)}" if choices else kind
        return name, f"--{name}={value}: expected {kind}"
    return name, f"--{name}={value}: {said}"


def _unknown(name: str) -> str:
    if name.startswith("config.") and "config" in flags.FLAGS:
        return f"--{name}: give --config=FILE before it, the experiment whose field it is"
    known = {flag.name for flag in own_flags()}
    known |= {f"no{flag.name}" for flag in own_flags() if flag.boolean}
    close = difflib.get_close_matches(name.replace("-", "_"), sorted(known), 3, 0.55)
    longer = sorted(flag for flag in known if name in flag.split("_"))
    word = re.compile(rf"\b{re.escape(name)}\b")
    takes_values = (flag for flag in own_flags() if not flag.boolean)
    about = sorted((found.start(), f.name) for f in takes_values if (found := word.search(f.help)))
    near = list(dict.fromkeys([*close[:1], *longer, *(flag for _, flag in about[:2])]))[:3]
    hint = f"did you mean {' or '.join(f'--{flag}' for flag in near)}? " if near else ""
    return f"unknown flag --{name}; {hint}--help lists all"


def _flag(name: str) -> flags.Flag | None:
    known = flags.FLAGS  # whose `get` would give the flag's value
    return known[name] if name in known else None  # noqa: SIM401


def _meaning(name: str) -> str:
    flag = _flag(name)
    return "" if flag is None else flag.help


def _with_meaning(name: str) -> str:
    return f"--{name} ({_meaning(name)})"


def _listed(parts: list[str]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
