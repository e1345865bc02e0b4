"""Every parser of bytes from outside, by format name: any input gives a value or `Malformed`, nothing else."""

from collections.abc import Callable

from moorline.evidence import eventlog, ima, snp, tpm_quote, tpm_structures
from moorline.ledger import checkpoint, proof, transactions
from moorline.nfv import SpiffeId
from moorline.orchestration import descriptor
from moorline.verification import anchors
from moorline.wire import cbor, certificates, cose, keys, launch, schema, session

FORMATS: dict[str, Callable[[bytes], object]] = {
    "snp-report": snp.parse_report,
    "snp-certificate-table": snp.parse_certificate_table,
    "snp-anchors": anchors.parse_anchor_file,
    "tpm-quote": tpm_quote.parse_quote,
    "tpm-nv-certification": tpm_quote.parse_nv_certification,
    "tpm-public": tpm_structures.parse_public,
    "tpm-signature": tpm_structures.parse_signature,
    "eventlog": eventlog.parse_event_log,
    "ima": ima.parse_ima,
    "cbor": cbor.decode,
    "cose": lambda data: cose.parse("fuzz", data),
    "certificate": certificates.parse_certificate,
    "public-key": keys.parse_public,
    "launch-fields": launch.parse_fields,
    "session-hello": lambda data: schema.decode(session.Hello, data),
    "spiffe-id": lambda data: SpiffeId.parse(data.decode("latin-1")),
    "ledger-transaction": transactions.parse,
    "ledger-note": checkpoint.parse_note,
    "ledger-bundle": proof.parse_bundle,
    "package-descriptor": descriptor.parse,
}
