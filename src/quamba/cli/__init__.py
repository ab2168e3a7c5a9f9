"""The commands. Importing this package before torch sets how its CPU threads wait."""

import os

# Threads that spin while they wait make every parallel step 20 times slower as soon as another program wants
# a core (docs/notes/cpu-threads.md); threads that sleep cost a tenth on an idle machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
