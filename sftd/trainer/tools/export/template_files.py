"""The chat template of an exported folder."""

import json
import shutil
from pathlib import Path

from sftd.domain.data.chat_template import ChatTemplate


def write_template(folder: Path, template: ChatTemplate | None) -> None:
    """Make the training data's own template the only one of a copied model folder. Without one, the folder's templates
    stay."""
    if template is None or template.text is None:
        return
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    (folder / "chat_template.json").unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text(template.text, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("chat_template", None) is not None:
            path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
