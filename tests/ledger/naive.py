# ruff: noqa: N802 - methods have the names of the transactions they are about
"""The registry once more, written from PROTOCOLS.md 1 without looking at the code: sets and dictionaries, no bytes.

`Naive.send` says whether a transaction passes and changes the model if it does. Senders are ("authority", name, key),
("provider", name, key) and ("hsm", provider, hsm, key); keys are small numbers that stand for key pairs of that owner.
"""

from dataclasses import dataclass, field

WEEK_S = 7 * 86400
GLOBAL = {"measurement", "chip", "vendor-root"}
OF_HSM = {"instance", "device", "certificate", "host", "launcher"}
PROVIDER_ACTIONS = {"AdmitProvider", "SuspendProvider", "ReinstateProvider", "RemoveProvider"}


@dataclass
class Naive:
    authorities: dict = field(default_factory=dict)  # in force: name -> key
    once: set = field(default_factory=set)  # names of authorities there ever were
    spent: set = field(default_factory=set)  # every key pair ever registered, with its owner's name
    max_age: int = 30
    proposals: list = field(default_factory=list)
    providers: dict = field(default_factory=dict)  # name -> {"status", "certificates"}
    things: dict = field(default_factory=dict)  # (kind, provider, id) -> record
    contracts: dict = field(default_factory=dict)
    revoked: set = field(default_factory=set)
    anchors: dict = field(default_factory=dict)
    values: dict = field(default_factory=dict)
    now: int = 0

    # Who may speak ---------------------------------------------------------------------------------------------------

    def send(self, sender, body):
        if sender[0] == "authority":
            return self.authorities.get(sender[1]) == sender[2] and self.by_authority(sender[1], body)
        provider = self.providers.get(sender[1])
        if provider is None or provider["status"] != "active":
            return False
        if sender[0] == "hsm":
            hsm = self.things.get(("hsm", sender[1], sender[2]))
            mine = (body[0] == "Revoke" and body[1] in OF_HSM) or (body[0] == "AnchorLog" and body[1] == sender[2])
            if hsm is None or hsm["status"] != "active" or hsm["key"] != sender[3] or not mine:
                return False
        elif sender[2] not in self.counting(sender[1]):
            return False
        return getattr(self, body[0])(sender[1], *body[1:])

    def counting(self, name):
        return {key for key, _ in self.alive(name)}

    def alive(self, name):
        """(key, issuer) of the certificates that count, with the time they end or None."""
        found = self.providers[name]["certificates"]
        return {one: retire for one, retire in found.items() if retire is None or self.now < retire}

    # Together --------------------------------------------------------------------------------------------------------

    def by_authority(self, name, body):
        if body[0] == "Propose":
            if not self.act(body[1], really=False):
                return False
            self.proposals.append({"action": body[1], "by": {name}, "open": True, "until": self.now + WEEK_S})
            self.settle(self.proposals[-1])
            return True
        found = self.proposals[body[1]]
        if not found["open"] or self.now > found["until"] or name in found["by"]:
            return False
        before = set(found["by"])
        found["by"].add(name)
        if self.enough(found) and not self.act(found["action"], really=False):
            found["by"] = before  # the approval that would complete it fails with the action
            return False
        self.settle(found)
        return True

    def enough(self, found):
        n = len(self.authorities)
        faults = (n - 1) // 3
        wanted = max(2, faults + 1) if found["action"][0] in PROVIDER_ACTIONS else 2 * n // 3 + 1
        return len(found["by"] & set(self.authorities)) >= wanted

    def settle(self, found):
        if self.enough(found):
            found["open"] = False
            assert self.act(found["action"], really=True)

    def act(self, action, *, really):
        kind, *rest = action
        return getattr(self, f"act_{kind}")(*rest, really=really)

    def act_AdmitAuthority(self, name, key, *, really):
        if name in self.once or (name, key) in self.spent or len(self.authorities) >= 64:
            return False
        if really:
            self.once.add(name)
            self.authorities[name] = key
            self.spent.add((name, key))
        return True

    def act_RetireAuthority(self, name, *, really):
        if name not in self.authorities or len(self.authorities) <= 2:
            return False
        if really:
            del self.authorities[name]
        return True

    def act_RotateAuthorityKey(self, name, key, *, really):
        if name not in self.authorities or (name, key) in self.spent:
            return False
        if really:
            self.authorities[name] = key
            self.spent.add((name, key))
        return True

    def act_SetParameter(self, value, *, really):
        if not 2 <= value <= 86400:
            return False
        if really:
            self.max_age = value
        return True

    def act_RevokeGlobally(self, kind, what, *, really):
        if kind not in GLOBAL or (kind, "consortium", what) in self.revoked:
            return False
        if really:
            self.revoked.add((kind, "consortium", what))
        return True

    def act_AdmitProvider(self, name, key, issuer, *, really):
        if name in self.providers or (name, key) in self.spent or self.authorities.get(issuer) != 0:
            return False
        if really:
            self.providers[name] = {"status": "active", "certificates": {(key, issuer): None}}
            self.spent.add((name, key))
        return True

    def act_SuspendProvider(self, name, *, really):
        return self.become(name, "suspended", {"active"}, really)

    def act_ReinstateProvider(self, name, *, really):
        return self.become(name, "active", {"suspended"}, really)

    def act_RemoveProvider(self, name, *, really):
        return self.become(name, "removed", {"active", "suspended"}, really)

    def become(self, name, status, before, really):
        if name not in self.providers or self.providers[name]["status"] not in before:
            return False
        if really:
            self.providers[name]["status"] = status
        return True

    # A provider ------------------------------------------------------------------------------------------------------

    def RotateProviderKey(self, name, key, issuer, overlap):
        before, alive = self.providers[name]["certificates"], self.alive(name)
        given_up = (name, key) in self.spent and key not in self.counting(name)
        if (key, issuer) in before or given_up or self.authorities.get(issuer) != 0 or overlap <= 0 or len(alive) >= 4:
            return False
        end = self.now + overlap
        kept = {one: end if retire is None else min(retire, end) for one, retire in alive.items()}
        self.providers[name]["certificates"] = {**kept, (key, issuer): None}
        self.spent.add((name, key))
        return True

    def add(self, kind, name, what, **record):
        if (kind, name, what) in self.things:
            return False
        self.things[kind, name, what] = {"status": "active", **record}
        return True

    def end(self, kind, name, what, status="revoked"):
        found = self.things.get((kind, name, what))
        if found is None or found["status"] != "active":
            return False
        found["status"] = status
        return True

    def spend(self, owner, key):
        """A key pair of a record of a provider; true if it never was anybody's there."""
        if (owner, key) in self.spent:
            return False
        self.spent.add((owner, key))
        return True

    def RegisterIssuingCa(self, name, what, key, ca):
        fresh = ("issuing-ca", name, what) not in self.things and (f"{name}/record", key) not in self.spent
        return (
            fresh and ca in self.counting(name) and self.spend(f"{name}/record", key) and self.add("issuing-ca", name, what)
        )

    def RevokeIssuingCa(self, name, what):
        return self.end("issuing-ca", name, what)

    def RegisterHsm(self, name, what, key, ca, sequence):
        if ("hsm", name, what) in self.things or ca not in self.counting(name) or not self.spend(f"{name}/record", key):
            return False
        return self.add("hsm", name, what, key=key, sequence=sequence)

    def RotateHsm(self, name, what, key, ca, sequence):
        found = self.things.get(("hsm", name, what))
        if found is None or found["status"] != "active" or sequence <= found["sequence"] or ca not in self.counting(name):
            return False
        if key != found["key"] and not self.spend(f"{name}/record", key):
            return False
        found.update(key=key, sequence=sequence)
        return True

    def RevokeHsm(self, name, what):
        return self.end("hsm", name, what)

    def RegisterOrchestrator(self, name, what, key):
        if ("orchestrator", name, what) in self.things or not self.spend(f"{name}/record", key):
            return False
        return self.add("orchestrator", name, what)

    def RevokeOrchestrator(self, name, what):
        return self.end("orchestrator", name, what)

    def RegisterService(self, name, what):
        return self.add("service", name, what)

    def UpdateService(self, name, what):
        found = self.things.get(("service", name, what))
        return found is not None and found["status"] == "active"

    def RemoveService(self, name, what):
        return self.end("service", name, what, "removed")

    def RegisterPlatform(self, name, what):
        return self.add("platform", name, what)

    def RevokePlatform(self, name, what):
        return self.end("platform", name, what)

    def RegisterReferenceValues(self, name, what, value):
        self.values[name, what] = value
        return True

    def OfferAccess(self, name, contract, service, grantee, good):
        offered = self.things.get(("service", name, service))
        other = self.providers.get(grantee)
        if contract in self.contracts or offered is None or offered["status"] != "active" or not good:
            return False
        if other is None or other["status"] != "active":
            return False
        self.contracts[contract] = {"status": "offered", "provider": name, "grantee": grantee}
        return True

    def AcceptAccess(self, name, contract):
        found = self.contracts.get(contract)
        if found is None or found["grantee"] != name or found["status"] != "offered":
            return False
        found["status"] = "accepted"
        return True

    def WithdrawAccess(self, name, contract):
        found = self.contracts.get(contract)
        if found is None or name not in (found["provider"], found["grantee"]) or found["status"] == "withdrawn":
            return False
        found["status"] = "withdrawn"
        return True

    def Revoke(self, name, kind, what):
        if kind == "vendor-root" or (kind, name, what) in self.revoked:
            return False
        self.revoked.add((kind, name, what))
        return True

    def AnchorLog(self, name, log, size, root):
        before = self.anchors.get((name, log))
        if before is not None and (size < before[0] or (size == before[0] and root != before[1])):
            return False
        self.anchors[name, log] = (size, root)
        return True
