"""What the pickle of a checkpoint may say, looked at without loading it (no torch).

torch's ``weights_only`` loader runs no code, but a pickle of 2 kB can make it take any amount of memory: by calling
``bytearray(n)``; by ``_codecs.encode`` with the codec 'hex', which doubles a text each time; by letting ``set``, or the
arguments of a call, go through a tensor that declares 10⁹ elements of one stored number. So only the names below may
occur, and only in the forms that ``torch.save`` writes.
"""

from __future__ import annotations

import pickletools
import re
from typing import IO, Any

from prunet_zoo.errors import CheckpointError

MOST = 64 * 2**20  # bytes of a pickle without its tensors; a training checkpoint of the largest network has 0.3 MB
_SHORT = 255  # characters of a text that may be used again

_PLAIN = re.compile(
    r"""collections\.OrderedDict | argparse\.Namespace | _codecs\.encode
    | numpy\.dtype | numpy\.(_core|core)\.multiarray\.scalar
    | torch\.nn\.parameter\.Parameter | torch\._utils\._rebuild_(tensor|tensor_v[23]|parameter|parameter_with_state)
    | torch\.[A-Z][A-Za-z0-9]*Storage | torch\.storage\.(Untyped|Typed)Storage
    | torch\.(device|bool|u?int\d+|b?float\d\w*|complex\d+)""",
    re.VERBOSE,
)
_LETTER_OF = {"collections.OrderedDict": "O", "_codecs.encode": "E"}  # T: any storage
_LETTERS = {  # of the operations that torch reads; those of pickle protocol 2
    **dict.fromkeys(("EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_SET", "BINFLOAT", "LONG1", "BINPERSID"), "o"),
    **dict.fromkeys(("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2"), "i"),
    **dict.fromkeys(("EMPTY_DICT", "SETITEM", "SETITEMS"), "d"),
    **dict.fromkeys(("TUPLE1", "TUPLE2", "TUPLE3"), "2"),
    **{"MARK": "(", "TUPLE": "t", "EMPTY_TUPLE": ")", "REDUCE": "R", "NEWOBJ": "N", "BUILD": "B"},
}
_STATE_OF_DTYPE = re.compile(r"\([si]{8,9}tB")
# where it is not as torch.save writes it: encode(text, 'latin1'), OrderedDict(), a storage and
# its key; a call's arguments are a tuple and an object's state is a dict, both written out there
_ODD = re.compile(r"E(?![sSL]L2R) | O(?!\)R) | T(?!s) | (?<![t2)])[RN] | (?<!d)B", re.VERBOSE)


def check_pickles(file: IO[bytes], where: str, count: int = 1) -> None:
    """Check ``count`` pickles, one after the other, from where ``file`` stands.

    Raises:
        CheckpointError: one is cut off, too large, refers to what is not on the list, or uses it in another way.
    """
    begin = file.tell()
    for _ in range(count):
        try:
            forms = _STATE_OF_DTYPE.sub("o", _forms(file, where, begin + MOST))
        except CheckpointError:
            raise
        except Exception as error:  # whatever damaged bytes provoke
            raise CheckpointError(
                f"{where} is damaged, truncated or no plain checkpoint ({type(error).__name__}: {error})"
            ) from None
        if _ODD.search(forms):
            raise CheckpointError(
                f"{where} is refused: its pickle makes calls that torch.save writes for no tensor or plain value, such "
                "as take any amount of memory; it was not loaded"
            )


def _forms(file: IO[bytes], where: str, end: int) -> str:
    """One letter for each operation of a pickle, without those that only put a value aside; a value that is used again
    has the letter that it had: those of `_LETTER_OF`, L the text 'latin1', s and S a short and a long text."""
    letters: list[str] = []
    aside: dict[int, str] = {}
    value: Any
    for operation, value, position in pickletools.genops(file):
        if position is not None and position > end:
            raise CheckpointError(f"{where} is refused: its pickle is larger than {MOST:,} bytes")
        name = operation.name
        if name in ("PROTO", "STOP"):
            continue
        if name in ("BINPUT", "LONG_BINPUT"):
            top = letters[-1] if letters else "o"
            aside[value] = top if top in "EOTLs" else "o"
        elif name in ("BINGET", "LONG_BINGET"):
            letters.append(aside.get(value, "o"))
        elif name == "GLOBAL":
            letters.append(_letter_of(str(value), where))
        elif name in ("BINUNICODE", "SHORT_BINSTRING"):
            is_codec = name == "BINUNICODE" and value == "latin1"
            letters.append("L" if is_codec else "s" if len(value) <= _SHORT else "S")
        elif name in _LETTERS:
            letters.append(_LETTERS[name])
        else:
            raise ValueError(f"torch.save writes no operation {name}")
    return "".join(letters)


def _letter_of(value: str, where: str) -> str:
    module, _, attribute = value.partition(" ")
    name = f"{'builtins' if module == '__builtin__' else module}.{attribute}"
    if not _PLAIN.fullmatch(name):
        raise CheckpointError(
            f"{where} is refused: its pickle refers to {name}, which is not on the list of plain types, and what "
            "is not could run code; it was not run. Only tensors and plain values are read: save the state dict alone"
        )
    return "T" if name.endswith("Storage") else _LETTER_OF.get(name, "o")
