"""`python -m teacher_server` is `teacher-serve`."""

import sys

from teacher_server.cli import main

sys.exit(main())
