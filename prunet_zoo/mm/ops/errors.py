"""What the operators refuse."""

from prunet_zoo.errors import PrunetError


class OperandError(PrunetError, ValueError):
    """A tensor that was given to an operator has values that the operator has no result for."""
