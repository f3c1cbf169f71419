import graphops, solvers  # noqa: E401, I001  (the alias: `from proxode import solvers`)
