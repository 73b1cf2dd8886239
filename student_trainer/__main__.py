"""`python -m student_trainer` is `student-train`."""

from student_trainer.cli import main

main()
