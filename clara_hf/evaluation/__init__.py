"""Systems compared on questions: scores, intervals, tests, costs and reports."""
