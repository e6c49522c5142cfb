"""docs/architecture.md names files that exist, and every room."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_file_that_the_page_names_exists():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:glm_jax|configs|convert|launch|tests)/[\w/.]*)`", text))
    assert len(named) > 60
    assert {name for name in named if not (ROOT / name).exists()} == set()
    rooms = {
        f"glm_jax/{p.name}/" for p in (ROOT / "glm_jax").iterdir() if (p / "__init__.py").exists()
    }
    assert rooms - {"glm_jax/cli/"} <= named
