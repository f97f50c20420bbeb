"""Names to embeddings: the contrastive pass of the text decoder over prompts, averaged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mammut.model import Mammut
from mammut_runtime.errors import InputError
from mammut_runtime.tokenizer import Tokenizer

TEXTS_AT_ONCE = 128


@torch.no_grad()
def class_embeddings(
    model: Mammut, tokenizer: Tokenizer, names: Sequence[str], templates: Sequence[str] = ("{}",)
) -> Tensor:
    """Each name in every template, embedded; their mean, brought to unit length.

    Args:
        names: one or more, none of them empty.
        templates: one or more, each holding {}.

    Returns:
        float32[K, E], unit length, on the model's device.

    Raises:
        InputError: no names or templates, an empty name, or a template without {}.
    """
    if not names or not templates:
        raise InputError(f"expected at least one name and one template, got {len(names)} and {len(templates)}")
    for name in names:
        if not tokenizer.clean(name):
            raise InputError(f"a name is empty: {name!r}; give words for what is to be found")
    for template in templates:
        if template.count("{}") != 1:
            raise InputError(f"template {template!r}: expected {{}} once, for the name")
    texts = [template.replace("{}", name) for name in names for template in templates]
    ids = torch.from_numpy(tokenizer.tokenize(texts, model.config.text.context_length))
    device = model.text.positions.device
    each = torch.cat([model.encode_text(part.to(device)) for part in torch.split(ids, TEXTS_AT_ONCE)])
    return F.normalize(each.reshape(len(names), len(templates), -1).mean(dim=1), dim=-1)
