"""Those who vouch for hardware (RATS: endorsers), over the network: AMD's KDS and Intel's PCS behind one port.

Nothing that arrives here is trusted: items are judged by `verification.collateral_judging` before they are stored.
"""
