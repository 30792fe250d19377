"""What the name of a module or of its class says about its kind.

Names are read word by word, so that "SeedOssMLP" is seed, oss, mlp and holds no "ssm". As in English the last word that
tells decides: an `attention_norm` is a norm, an `attention_mlp` an MLP.
"""

from __future__ import annotations

import re
from collections.abc import Collection

MLP = "mlp"
ATTENTION = "attention"
NORM = "norm"
ROUTER = "router"
RECURRENT = "state space or recurrence"
SIDE_PATH = "side path of a layer"

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_ACRONYM = re.compile(r"^(\w+)(MLP|FFN|SSM|MOE)$")  # NemotronHMLP
_KINDS = {
    MLP: {
        *("mlp", "ff", "ffn", "ffw", "feedforward", "moe", "expert"),
        *("denserelu", "channelmix", "channelmixing", "cmix"),  # T5's DenseReluDense, RWKV's
    },
    ATTENTION: {"attn", "att", "attention", "mha", "rotary"},
    NORM: {"norm", "layernorm", "rmsnorm", "batchnorm", "groupnorm", "ln"},
    ROUTER: {"router"},
    "embedding": {"embed", "embedding", "embedder"},
    "convolution": {"conv", "convolution", "shortconv", "conv1d", "sconv"},
    RECURRENT: {
        *("mamba", "mamba2", "ssm", "rglru", "lru", "recurrent", "deltanet", "rwkv"),
        *("timemix", "timemixing", "tmix"),
        *("lstm", "mlstm", "slstm", "gru", "rnn"),
    },
    SIDE_PATH: {"altup", "laurel", "hyperconnection"},
}
_OF_WORD = {word: kind for kind, words in _KINDS.items() for word in words}
_GATE = re.compile(r"^(gate|shared_expert_gate|block_sparse_moe_gate|gate_weight)$")
_NUMBERED = re.compile(r"^((dense|linear)(_?general)?_|einsum_)?\d+$", re.IGNORECASE)
_SIDE = re.compile(r"^per_layer_|^(hc|hyper)_")  # inputs that a layer takes besides the residual stream
_QUERY = re.compile(r"^(w_?)?(q|qkv)(_?proj|_?lin|_einsum)?$|^(query|query_key_value)$", re.IGNORECASE)
_KEY_OR_VALUE = re.compile(r"^(w_?)?(k|v|kv|qkv)(_?proj|_?lin|_einsum)?$|^(key|value|query_key_value)$", re.IGNORECASE)
_OUT = re.compile(r"^(w_?)?(o|out)(_?proj|_?lin|_einsum)?$", re.IGNORECASE)
_FOREIGN = {"vision", "visual", "image", "images", "img", "audio", "speech", "video", "tower", "vit", "acoustic"}
_FOREIGN_ABOVE = _FOREIGN | {
    *("projector", "connector", "resampler", "perceiver", "aligner", "merger", "qformer", "siglip", "clip", "swin"),
    *("codec", "vq", "vqmodel", "vqvae", "wav", "talker", "diffusion", "dit", "protein", "speaker"),
}


def words(name: str) -> tuple[str, ...]:
    """In lower case and in the singular, digits apart.

    Example:
        >>> words("SeedOssMLP"), words("mlp_norms"), words("NemotronHMLP")
        (('seed', 'oss', 'mlp'), ('mlp', 'norm'), ('nemotron', 'h', 'mlp'))
    """
    found: list[str] = []
    for word in _WORD.findall(name):
        acronym = _ACRONYM.match(word)
        found += acronym.groups() if acronym else (word,)
    return tuple(w[:-1] if w.endswith("s") and w[:-1] in _OF_WORD else w for w in (word.lower() for word in found))


def told_by_name(attribute: str) -> str | None:
    """Kind of module that an attribute's name tells of.

    Example:
        >>> told_by_name("feed_forward"), told_by_name("post_attention_layernorm"), told_by_name("dense")
        ('mlp', 'norm', None)
    """
    return SIDE_PATH if _SIDE.match(attribute) else _last(words(attribute))


def told_by_class(name: str) -> str | None:
    """Kind of module that the name of its class tells of.

    A norm and attention only by the last word, since models and layers are named RobertaPreLayerNorm and
    ZambaAttentionDecoderLayer.

    Example:
        >>> told_by_class("NemotronHMLP"), told_by_class("ZambaAttentionDecoderLayer"), told_by_class("Conv1D")
        ('mlp', None, None)
    """
    if name == "Conv1D":  # GPT-2's linear layer
        return None
    kind = _last(tuple(word for word in words(name) if not word.isdigit()))
    return kind if kind not in (NORM, ATTENTION) or told_by_last_word(name) == kind else None


def told_by_last_word(name: str) -> str | None:
    """Kind that the last word alone tells of: "MultiHeadAttention", not "AttentionDecoderLayer"."""
    found = [word for word in words(name) if not word.isdigit()]
    return _OF_WORD.get("".join(found[-2:])) or _OF_WORD.get(found[-1]) if found else None


def is_gate(attribute: str) -> bool:
    """Of a router, or one half of a gated MLP: which, only shapes tell."""
    return _GATE.match(attribute) is not None


def is_numbered(attribute: str) -> bool:
    """Called by what it computes and a number, which is no name: flax's `Dense_0`, haiku's `linear_1`, an index.

    Example:
        >>> is_numbered("Dense_0"), is_numbered("DenseGeneral_3"), is_numbered("2"), is_numbered("dense_h_to_4h")
        (True, True, True, False)
    """
    return _NUMBERED.match(attribute) is not None


def is_attention_weight(attribute: str, beside: Collection[str]) -> bool:
    """Called as one of attention's matrices, such as `wq`, `k_proj` or `value`; its last one is `wo` beside a query.

    Example:
        >>> is_attention_weight("wo", {"wq", "wk", "wv", "w1"}), is_attention_weight("wo", {"wi"})
        (True, False)
    """
    if _OUT.match(attribute):
        return any(map(_QUERY.match, beside))
    return bool(_QUERY.match(attribute) or _KEY_OR_VALUE.match(attribute))


def holds_attention(attributes: Collection[str]) -> bool:
    """Whether a module with these parts is attention, whatever it is called."""
    return any(map(_QUERY.match, attributes)) and any(map(_KEY_OR_VALUE.match, attributes))


def is_mixer(name: str) -> bool:
    return "mixer" in words(name)


def is_head(attribute: str) -> bool:
    return bool({"head", "heads"} & {*words(attribute)})


def is_foreign(attribute: str, above_layers: bool) -> bool:
    """Of a tower that reads or makes what is no text, or of what joins it to the language model."""
    return bool({*words(attribute)} & (_FOREIGN_ABOVE if above_layers else _FOREIGN))


def without_model_name(name: str, others: tuple[str, ...]) -> str:
    """A class without the name of its model, which it has in common with the classes around it.

    Example:
        >>> without_model_name("RobertaPreLayerNormOutput", ("RobertaPreLayerNormModel",))
        'Output'
    """
    longest = 0
    starts = [i for i in range(1, len(name)) if name[i].isupper() and not name[i - 1].isupper()]
    for other in others:
        common = [i for i in starts if other.startswith(name[:i]) and not other[i : i + 1].islower()]
        longest = max([longest, *common])
    return name[longest:]


def _last(names: tuple[str, ...]) -> str | None:
    kind = None
    for i, word in enumerate(names):
        pair = names[i - 1] + word if i else word  # feed_forward, FeedForward, delta_net, layer_norm
        kind = _OF_WORD.get(pair) or _OF_WORD.get(word) or kind
    return kind
