"""What a Linux machine says about itself, capability by capability: one file a noun, read below a root directory.

A probe reads kernel files and configuration and returns Observations (`policy.sec009.assessment`); it decides nothing else.
Everything it reads is untrusted: whoever runs the machine can make these files say anything, so nothing here is ever
more than `asserted` (root `software`). Reading is bounded and never waits (`tree`); what cannot be read is `not_probed`,
with why.
"""
