"""Running programs that a model wrote, apart from everything else, and testing them.

`sandbox.py` is the way in: `run_programs` returns whether each program passes its tests. For each program it starts a
fresh interpreter that knows nothing of this process. There `isolation.py` leaves the machine behind (or bubblewrap
does), `supervisor.py` runs the tests, and `program.py` runs the program, in a process of its own. These three files
import nothing but the standard library, since they run where this package does not exist.
"""
