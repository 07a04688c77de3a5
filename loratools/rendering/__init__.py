"""Reports as text: for a terminal, for Graphviz, for Mermaid. Nothing here opens a file."""

from loratools.rendering._difference import difference
from loratools.rendering._dot import dot
from loratools.rendering._mermaid import mermaid
from loratools.rendering._names import number_of
from loratools.rendering._tree import tree
from loratools.rendering.text import inspection

__all__ = ["difference", "dot", "inspection", "mermaid", "number_of", "tree"]
