"""Read YAML of users: task files, prompt files, published numbers."""

from pathlib import Path
from typing import Any

import yaml

from glm_jax.errors import UserError, parser_refusal
from glm_jax.text_files import TextFileError, read_text

_DATE = "tag:yaml.org,2002:timestamp"


class _Loader(yaml.SafeLoader):
    """Loads plain values only, as JSON has them; no tags, no anchors."""

    # A date is the text that it is written as.
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _DATE]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            # A few lines of aliases of aliases stand for gigabytes.
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="an alias: write it out", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            problem = f"{twice[:60]!r} is given twice"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, error: type[UserError] = TextFileError) -> dict[str, Any]:
    """Return the fields of a YAML file; dates are texts, aliases are refused.

    Args:
      error: class of errors to raise.

    Raises:
      error: it cannot be read, is no YAML, or is something other than fields.
    """
    try:
        content = yaml.load(read_text(path), _Loader)  # a kind of SafeLoader
    except TextFileError as unreadable:
        raise error(str(unreadable)) from unreadable
    except RecursionError:
        raise error(f"{path} is no YAML: nested too deeply") from None
    except yaml.MarkedYAMLError as wrong:
        line = "" if wrong.problem_mark is None else f":{wrong.problem_mark.line + 1}"
        raise error(f"{path}{line} is no YAML: {wrong.problem or wrong}") from wrong
    except (yaml.YAMLError, ValueError) as wrong:
        raise error(f"{path} is no YAML: {parser_refusal(wrong)}") from wrong
    if not isinstance(content, dict):
        raise error(f"{path}: no fields: 'NAME: VALUE' lines are expected")
    return {str(name): value for name, value in content.items()}
