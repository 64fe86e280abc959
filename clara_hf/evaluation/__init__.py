"""Systems compared on questions: scores, intervals, tests, costs and reports; see `evaluator.Evaluator`."""
