"""An authority that breaks the rules: `python byzantine.py HOW authority run --config FILE`. The product has no such switch.

equivocate    its signer forgets what it signed: two of it at once sign two blocks at one height
propose       its proposals hold a transaction that does not apply
censor        it proposes empty blocks whatever waits
future, past  its votes say a time one day off
"""

import sys

from moorline.ledger.engines.cometbft import application, signer
from moorline.ledger.engines.cometbft.proto import abci_types_pb2 as pb

DAY_S = 86_400


def equivocate():
    signer.Signer._once = lambda _self, _height, _round, _step, _message, time_ns: time_ns


def propose():
    honest = application.Application.prepare_proposal

    def lying(self, request):
        answer = honest(self, request)
        answer.prepare_proposal.txs.append(b"what no state machine takes")
        return answer

    application._METHODS["prepare_proposal"] = lying
    application._METHODS["process_proposal"] = lambda _self, _request: pb.Response(
        process_proposal=pb.ResponseProcessProposal(status=pb.ResponseProcessProposal.ACCEPT)
    )


def censor():
    application._METHODS["prepare_proposal"] = lambda _self, _request: pb.Response(
        prepare_proposal=pb.ResponsePrepareProposal()
    )


def shifted(seconds):
    honest = signer._ns

    def lying(time):
        return honest(time) + seconds * 10**9

    signer._ns = lying


HOW = {
    "equivocate": equivocate,
    "propose": propose,
    "censor": censor,
    "future": lambda: shifted(DAY_S),
    "past": lambda: shifted(-DAY_S),
}

if __name__ == "__main__":
    HOW[sys.argv.pop(1)]()
    from moorline.cli import main

    main()
