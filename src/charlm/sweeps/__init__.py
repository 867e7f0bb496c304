"""Many runs from one file: overrides, the plan, the executors, the records and the page."""
