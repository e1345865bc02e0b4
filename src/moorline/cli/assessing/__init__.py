"""How `moor host assess` shows an assessment: on a terminal, as a page, as SARIF."""
