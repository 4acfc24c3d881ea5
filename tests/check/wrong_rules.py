"""Wrong backward rules, each a mistake that people make, and the right ones that they were made from.

python -m tests.check.wrong_rules       who finds them: a table for this checker, JAX's, chex's and PyTorch's
"""

from tests.check.rules import Right, Wrong
from tests.check.wrong_arrays import ALONG, LINEAR
from tests.check.wrong_elementwise import ELEMENTWISE
from tests.check.wrong_layers import LAYERS
from tests.check.wrong_models import MODELS

WRONG: list[Wrong] = ELEMENTWISE + LINEAR + ALONG + MODELS + LAYERS
RIGHT: list[Right] = list({id(wrong.right): wrong.right for wrong in WRONG}.values())

if __name__ == "__main__":
    from tests.check.peers import compared

    print(compared(WRONG, RIGHT))
