"""What authorities do together: propose, approve, and the actions that follow.

Approvals are counted against the authorities in force before the block (PROTOCOLS.md 1). An action that would be refused
now is refused when it is proposed already, and is judged again, on the state of then, by the approval that completes it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from moorline import nfv
from moorline.errors import Conflict, Malformed, MoorlineError, Refused
from moorline.ledger import genesis, issuance, records, revocations, transactions
from moorline.ledger.checkpoint import quorum_of, tolerated_faults
from moorline.ledger.draft import Draft
from moorline.ledger.parameters import PARAMETERS
from moorline.ledger.records import (
    AuthorityRecord,
    IndexRecord,
    ParameterRecord,
    ProposalRecord,
    ProposalStatus,
    ProviderRecord,
    RevocationKind,
    RootsRecord,
    Status,
)
from moorline.ledger.transactions import (
    Action,
    AdmitAuthority,
    AdmitProvider,
    Approve,
    Propose,
    ReinstateProvider,
    RemoveProvider,
    RetireAuthority,
    RevokeGlobally,
    RotateAuthorityKey,
    SetParameter,
    SuspendProvider,
    Transaction,
)
from moorline.wire import keys

_GLOBAL: Final = (RevocationKind.MEASUREMENT, RevocationKind.CHIP, RevocationKind.VENDOR_ROOT)
ProviderAction = AdmitProvider | SuspendProvider | ReinstateProvider | RemoveProvider


def threshold(action: Action, authorities: int, *, raised: int = 0) -> int:
    """How many of so many authorities must approve: max(2, f+1) for what concerns providers, else the quorum.

    `raised` is what the parameter asks for: it counts where it is more, and where there are so many.
    """
    concerns_provider = isinstance(action, ProviderAction)
    least = max(2, tolerated_faults(authorities) + 1) if concerns_provider else quorum_of(authorities)
    return max(least, min(raised, authorities))


def propose(draft: Draft, sender: str, body: Propose, transaction: Transaction) -> None:
    """Opens a proposal with the sender's approval. Refuses an action that would not pass now."""
    action = transactions.parse_action(body.kind, body.action)
    perform(draft.scratch(), action)
    proposal = ProposalRecord(
        id=transactions.proposal_id(transaction.payload),
        kind=body.kind,
        action=body.action,
        proposer=sender,
        approvals=(sender,),
        status=ProposalStatus.OPEN,
        expires_ms=draft.block.time_ms + draft.limit("proposal_life_s") * 1000,
    )
    _count_open(draft, proposal)
    draft.tell("proposed", records.proposal_key(proposal.id))
    _settle(draft, proposal, action)


def approve(draft: Draft, sender: str, body: Approve) -> None:
    """Adds an approval; executes the action when the threshold is met."""
    proposal = draft.read(ProposalRecord, records.proposal_key(body.proposal))
    if proposal is None:
        raise Refused("ledger.proposal_unknown", "there is no such proposal", got=body.proposal)
    if proposal.status is not ProposalStatus.OPEN:
        raise Conflict("ledger.proposal_closed", "the proposal was executed already", got=proposal.status.value)
    if draft.block.time_ms > proposal.expires_ms:
        raise Refused(
            "ledger.proposal_expired", "the proposal expired", expected=proposal.expires_ms, got=draft.block.time_ms
        )
    if sender in proposal.approvals:
        raise Conflict("ledger.already_approved", "this authority approved already", got=sender)
    approvals = tuple(sorted((*proposal.approvals, sender)))
    draft.tell("approved", records.proposal_key(proposal.id))
    _settle(draft, replace(proposal, approvals=approvals), transactions.parse_action(proposal.kind, proposal.action))


def _count_open(draft: Draft, proposal: ProposalRecord) -> None:
    """One authority cannot fill the ledger with proposals: only so many of its own are open at once."""
    key = records.open_proposals_index_key(proposal.proposer)
    index = draft.read(IndexRecord, key)
    still_open = [found for found in (() if index is None else index.holders) if _is_open(draft, found)]
    most = draft.limit("open_proposals")
    if len(still_open) >= most:
        raise Refused(
            "ledger.too_many_proposals",
            "this authority has too many open proposals",
            expected=most,
            got=len(still_open),
            remedy="have some approved, or wait until they expire",
        )
    draft.write(key, IndexRecord(holders=tuple(sorted((*still_open, proposal.id)))))


def _is_open(draft: Draft, proposal_id: str) -> bool:
    found = draft.read(ProposalRecord, records.proposal_key(proposal_id))
    return found is not None and found.status is ProposalStatus.OPEN and draft.block.time_ms <= found.expires_ms


def _settle(draft: Draft, proposal: ProposalRecord, action: Action) -> None:
    counted = set(proposal.approvals) & set(draft.block.authorities)
    raised = draft.limit("provider_approvals" if isinstance(action, ProviderAction) else "authority_approvals")
    done = len(counted) >= threshold(action, len(draft.block.authorities), raised=raised)
    if done:
        perform(draft, action)
    status = ProposalStatus.EXECUTED if done else ProposalStatus.OPEN
    draft.write(records.proposal_key(proposal.id), replace(proposal, status=status))


def perform(draft: Draft, action: Action) -> None:
    """The effect of an approved action."""
    match action:
        case AdmitProvider():
            _admit_provider(draft, action)
        case SuspendProvider():
            _change_provider(draft, action.name, Status.SUSPENDED, allowed=(Status.ACTIVE,))
        case ReinstateProvider():
            _change_provider(draft, action.name, Status.ACTIVE, allowed=(Status.SUSPENDED,))
        case RemoveProvider():
            _change_provider(draft, action.name, Status.REMOVED, allowed=(Status.ACTIVE, Status.SUSPENDED))
        case AdmitAuthority():
            _admit_authority(draft, action)
        case RetireAuthority():
            _retire_authority(draft, action)
        case RotateAuthorityKey():
            _rotate_authority_key(draft, action)
        case SetParameter():
            _set_parameter(draft, action)
        case RevokeGlobally():
            _revoke_globally(draft, action)


def _admit_provider(draft: Draft, action: AdmitProvider) -> None:
    name = records.parse_name(action.name, "provider")
    if name == records.CONSORTIUM or draft.get(records.provider_key(name)) is not None:
        raise Conflict("ledger.name_taken", "this provider name is taken", got=name)
    _free_domain(draft, action.trust_domain)
    issuance.provider(action.certificate, action.trust_domain, draft.authority_certificates(), draft.block.at)
    draft.claim_key(records.CONSORTIUM, issuance.spki(action.certificate), records.provider_key(name))
    draft.write(
        records.provider_key(name),
        ProviderRecord(
            name=name,
            trust_domain=action.trust_domain,
            status=Status.ACTIVE,
            ca_certificates=(action.certificate,),
            retire_at=(0,),
        ),
    )
    draft.write(records.trust_domain_index_key(action.trust_domain), IndexRecord(holders=(name,)))
    for parent in records.parent_domains(action.trust_domain):
        draft.write(records.parent_domain_index_key(parent), IndexRecord(holders=(name,)))
    revocations.begin(draft, name)
    draft.tell("provider_admitted", records.provider_key(name))


def _free_domain(draft: Draft, trust_domain: str) -> None:
    """A DNS constraint covers everything below it, so no trust domain may lie below another (or be one twice)."""
    try:
        nfv.parse_domain(trust_domain, "trust domain")
    except MoorlineError as error:
        raise Malformed("ledger.name_malformed", error.says, got=trust_domain) from None
    labels = trust_domain.split(".")
    if labels[-1].isdigit() or any(label[2:4] == "--" for label in labels):
        raise Malformed(
            "ledger.name_malformed",
            "a trust domain is no address and has no encoded label, which would look like another name (RFC 5890)",
            got=trust_domain,
        )
    taken = [
        domain
        for domain in (trust_domain, *records.parent_domains(trust_domain))
        if draft.get(records.trust_domain_index_key(domain)) is not None
    ]
    if draft.get(records.parent_domain_index_key(trust_domain)) is not None:
        taken.append(f"something below {trust_domain}")
    if taken:
        raise Conflict("ledger.trust_domain_taken", "this trust domain overlaps another", got=", ".join(taken))


def _change_provider(draft: Draft, name: str, status: Status, *, allowed: tuple[Status, ...]) -> None:
    record = draft.read(ProviderRecord, records.provider_key(name))
    if record is None:
        raise Refused("ledger.provider_unknown", "there is no such provider", got=name)
    if record.status not in allowed:
        raise Conflict(
            "ledger.provider_status",
            f"the provider cannot become {status.value} now",
            expected=" or ".join(allowed),
            got=record.status.value,
        )
    draft.write(records.provider_key(name), replace(record, status=status))
    draft.tell(f"provider_{status.value}", records.provider_key(name))


def _admit_authority(draft: Draft, action: AdmitAuthority) -> None:
    name = records.parse_name(action.name, "authority")
    if draft.get(records.authority_key(name)) is not None:
        raise Conflict("ledger.name_taken", "this authority name is taken", got=name)
    names = draft.authority_names()
    if len(names) >= genesis.MAX_AUTHORITIES:
        raise Refused("ledger.authorities_count", "there are as many authorities as can be", got=len(names))
    draft.write(records.authority_key(name), _authority(draft, action, kept=()))
    draft.write(records.AUTHORITIES_INDEX, IndexRecord(holders=tuple(sorted((*names, name)))))
    draft.tell("authority_admitted", records.authority_key(name))


def _rotate_authority_key(draft: Draft, action: RotateAuthorityKey) -> None:
    current = draft.read(AuthorityRecord, records.authority_key(action.name))
    if current is None or action.name not in draft.authority_names():
        raise Refused("ledger.authority_unknown", "there is no such authority in force", got=action.name)
    kept = issuance.authority_spkis(current.certificate, current.transaction_key, current.checkpoint_key)
    changed = _authority(draft, action, kept=kept)
    if changed == current:
        raise Conflict("ledger.already_registered", "nothing would change", got=action.name)
    draft.write(records.authority_key(action.name), changed)
    draft.tell("authority_key_rotated", records.authority_key(action.name))


def _authority(draft: Draft, action: AdmitAuthority | RotateAuthorityKey, *, kept: tuple[bytes, ...]) -> AuthorityRecord:
    """The record of an authority whose three keys are its own: certified by a root, distinct, and never anybody's before."""
    roots = draft.read(RootsRecord, records.ROOTS_KEY)
    issuance.authority(action.certificate, () if roots is None else roots.roots, draft.block.at)
    _transaction_key(action.transaction_key)
    records.parse_address(action.address, "an authority's address")
    for position, spki in enumerate(
        issuance.authority_spkis(action.certificate, action.transaction_key, action.checkpoint_key)
    ):
        # A key stays in its place: the old checkpoint key does not become the new transaction key.
        draft.claim_key(records.CONSORTIUM, spki, records.authority_key(action.name), kept=kept[position : position + 1])
    return AuthorityRecord(
        name=action.name,
        status=Status.ACTIVE,
        certificate=action.certificate,
        transaction_key=action.transaction_key,
        checkpoint_key=action.checkpoint_key,
        address=action.address,
    )


def _transaction_key(spki: bytes) -> None:
    try:
        keys.parse_public(spki)
    except Malformed as error:
        raise Malformed("ledger.key_malformed", "a transaction key cannot be used", got=error.code) from None


def _retire_authority(draft: Draft, action: RetireAuthority) -> None:
    record = draft.read(AuthorityRecord, records.authority_key(action.name))
    names = draft.authority_names()
    if record is None or action.name not in names:
        raise Refused("ledger.authority_unknown", "there is no such authority in force", got=action.name)
    if len(names) <= genesis.MIN_AUTHORITIES:
        raise Refused("ledger.authorities_count", "too few authorities would remain", expected=genesis.MIN_AUTHORITIES)
    draft.write(records.authority_key(action.name), replace(record, status=Status.RETIRED))
    draft.write(records.AUTHORITIES_INDEX, IndexRecord(holders=tuple(name for name in names if name != action.name)))
    draft.tell("authority_retired", records.authority_key(action.name))


def _set_parameter(draft: Draft, action: SetParameter) -> None:
    bounds = PARAMETERS.get(action.name)
    if bounds is None or not bounds.low <= action.value <= bounds.high:
        raise Refused(
            "ledger.parameter_bounds",
            "there is no such parameter, or it cannot have this value",
            expected="; ".join(f"{name} {one.low} to {one.high}" for name, one in PARAMETERS.items()),
            got=f"{action.name} {action.value}",
        )
    draft.write(records.parameter_key(action.name), ParameterRecord(name=action.name, value=action.value))
    draft.tell("parameter_set", records.parameter_key(action.name))


def _revoke_globally(draft: Draft, action: RevokeGlobally) -> None:
    if action.kind not in _GLOBAL:
        raise Refused("ledger.revocation_kind", "this is its registrant's to revoke", expected=_GLOBAL, got=action.kind)
    revocations.revoke(draft, action.kind, records.CONSORTIUM, action.id)
