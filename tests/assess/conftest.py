"""What tests of assessments share: the trees of machines, importable by name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
