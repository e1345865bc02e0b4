"""Is this text one that a contract may carry? Read and type-checked, in one pass, by rules that are the ledger's own.

A contract's conditions are Cedar, and HSMs evaluate them with the Cedar engine. What the ledger lets in, though, every
authority must judge alike for ever, also when the block is executed again years later. So admission does not ask a library
whose next version may think otherwise: it is this module, for a part of Cedar chosen such that the engine validates
everything taken here and never errs while evaluating it (docs/adr/0009; tests/verdict/test_conditions.py asks the engine).

    text       policy+
    policy     ("@" ("id" | "note") "(" STRING ")")* effect "(" scope ")" (("when" | "unless") "{" expr "}")* ";"
    effect     "permit" | "forbid"
    scope      principal ["==" ENTITY | "is" TYPE] "," action ["==" ENTITY] "," resource ["==" ENTITY | "is" TYPE]
    expr       or | "if" expr "then" expr "else" expr
    or         and ("||" and)*
    and        relation ("&&" relation)*
    relation   unary [("==" | "!=" | "<" | "<=" | ">" | ">=") unary | "like" STRING]
    unary      "!"{0,4} member
    member     primary ("." ATTRIBUTE | "." ("contains" | "containsAll" | "containsAny") "(" expr ")")*
    primary    "true" | "false" | NUMBER | STRING | ENTITY | "principal" | "resource" | "context" | "(" expr ")"
               | "[" expr ("," expr)* "]"

Sizes, policies and depth are bounded, and time is proportional to the length. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from moorline.errors import Malformed
from moorline.policy.condition_tokens import MAX_LONG, Kind, Token, form_of, malformed, tokens

NAMESPACE: Final = "Moorline"
MAX_BYTES: Final = 16 * 1024
"""The most any ledger can allow; its parameter `conditions_bytes` may say less."""
MAX_POLICIES: Final = 32
MAX_DEPTH: Final = 16
MAX_ELEMENTS: Final = 256

Type = str
"""`Bool`, `Long`, `String`, `Device`, `Service`, `Session`, or `Set<T>` of one of the first three."""
BOOL: Final = "Bool"
LONG: Final = "Long"
STRING: Final = "String"
STRINGS: Final = "Set<String>"

ATTRIBUTES: Final[Mapping[Type, Mapping[str, Type]]] = {
    # principal: who wants to connect. Proven by its certificate and the ledger.
    "Device": {"device": STRING, "provider": STRING, "trust_domain": STRING},
    # resource: the service of the contract, as its provider registered it.
    "Service": {"provider": STRING, "service": STRING, "use_case": STRING, "profiles": STRINGS},
    # context: this session. `post_quantum`: keys agreed with ML-KEM too. `now` is seconds since the epoch; `hour` 0 to 23
    # and `weekday` 1 (Monday) to 7, in UTC.
    "Session": {
        "contract": STRING,
        "profile": STRING,
        "post_quantum": BOOL,
        "now": LONG,
        "hour": LONG,
        "weekday": LONG,
    },
}
"""What conditions may ask about. All of it is always there, so no question can go wrong."""
ENTITIES: Final = {"Device": "principal", "Service": "resource"}
ACTION: Final = "connect"
_WORDS: Final = {"true": BOOL, "false": BOOL, "principal": "Device", "resource": "Service", "context": "Session"}
_WORDS_AND_SIGNS: Final = (Kind.SIGN, Kind.WORD)
_SET_METHODS: Final = ("contains", "containsAll", "containsAny")


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One rule: its id (`@id`, else `policy<n>` from 0), whether it permits or forbids, and the line it begins in."""

    id: str
    effect: str
    line: int


def require_valid(text: str, *, max_bytes: int) -> tuple[Policy, ...]:
    """The policies of conditions that may enter the ledger.

    Raises Malformed: "conditions.too_large", "conditions.malformed", "conditions.type". That they
    are valid says nothing about whom they let in.
    """
    if len(text) > max_bytes:
        raise Malformed("conditions.too_large", "the conditions are too long", expected=max_bytes, got=len(text))
    form = form_of(text)
    if form is not None:
        with suppress(Malformed):  # which would show the form's words
            return _policies_in(form)
    return policies_in(text)


def policies_in(text: str) -> tuple[Policy, ...]:
    """As `require_valid`, word by word, and of any length."""
    return _Reader(tokens(text)).policies()


_policies_in = lru_cache(maxsize=256)(policies_in)
"""Of a form; contracts of one kind differ in the names they mention. Bounded, by MAX_FORM_CHARS each; no refusal is kept."""


class _Reader:
    """Reads tokens from the left, one ahead; each method returns the type of what it read."""

    def __init__(self, found: list[Token]) -> None:
        self._tokens = found
        self._at = 0
        self._depth = 0

    # Policies --------------------------------------------------------------------------------------------------------

    def policies(self) -> tuple[Policy, ...]:
        found: list[Policy] = []
        while self._next.kind is not Kind.END:
            if len(found) >= MAX_POLICIES:
                raise malformed("there are too many policies", line=self._next.line, expected=f"<= {MAX_POLICIES}")
            found.append(self._policy(len(found)))
        if not found:
            raise malformed("there is no policy", line=1, expected="at least one; without one nobody is let in")
        ids = [one.id for one in found]
        if len(set(ids)) != len(ids):
            raise malformed("two policies have the same id", line=found[-1].line, got=", ".join(ids))
        return tuple(found)

    def _policy(self, index: int) -> Policy:
        line = self._next.line
        annotations: dict[str, str] = {}
        while self._takes("@"):
            name = self._one_of("id", "note")
            self._expect("(")
            value = self._string(wildcards=False)
            self._expect(")")
            if name in annotations or not value:
                raise malformed("an annotation is empty or stands there twice", line=line, got=f"@{name}")
            annotations[name] = value
        effect = self._one_of("permit", "forbid")
        self._scope()
        while self._next.text in ("when", "unless"):
            self._take()
            self._expect("{")
            self._require(BOOL, self._expression())
            self._expect("}")
        self._expect(";")
        return Policy(id=annotations.get("id", f"policy{index}"), effect=effect, line=line)

    def _scope(self) -> None:
        self._expect("(")
        self._participant("principal", "Device")
        self._expect(",")
        self._expect("action")
        if self._takes("=="):
            self._entity("Action")
        self._expect(",")
        self._participant("resource", "Service")
        self._expect(")")

    def _participant(self, name: str, kind: str) -> None:
        self._expect(name)
        if self._takes("=="):
            self._entity(kind)
        elif self._takes("is"):
            self._path(kind)

    def _entity(self, kind: str) -> Type:
        line = self._next.line
        self._path(kind)
        self._expect("::")
        value = self._string(wildcards=False)
        if kind == "Action" and value != ACTION:
            raise malformed("there is no such action", line=line, expected=ACTION, got=value)
        return kind

    def _path(self, kind: str) -> None:
        self._expect(NAMESPACE)
        self._expect("::")
        self._expect(kind)

    # Expressions -----------------------------------------------------------------------------------------------------

    def _expression(self) -> Type:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise malformed("they are nested too deeply", line=self._next.line, expected=f"<= {MAX_DEPTH} levels")
        found = self._choice() if self._takes("if") else self._any()
        self._depth -= 1
        return found

    def _choice(self) -> Type:
        self._require(BOOL, self._expression())
        self._expect("then")
        one = self._expression()
        self._expect("else")
        self._require(one, self._expression())
        return one

    def _any(self) -> Type:
        found = self._all()
        while self._takes("||"):
            self._require(BOOL, found)
            self._require(BOOL, self._all())
        return found

    def _all(self) -> Type:
        found = self._relation()
        while self._takes("&&"):
            self._require(BOOL, found)
            self._require(BOOL, self._relation())
        return found

    def _relation(self) -> Type:
        left = self._unary()
        following = self._tokens[self._at]
        sign = following.text if following.kind in _WORDS_AND_SIGNS else ""
        if sign in ("==", "!="):
            self._take()
            if left == "Session":
                raise self._mistyped("the session as a whole cannot be compared", "one of its attributes", left)
            self._require(left, self._unary())
        elif sign in ("<", "<=", ">", ">="):
            self._take()
            self._require(LONG, left)
            self._require(LONG, self._unary())
        elif sign == "like":
            self._take()
            self._require(STRING, left)
            self._string(wildcards=True)
        else:
            return left
        return BOOL

    def _unary(self) -> Type:
        signs = 0
        while self._takes("!"):
            signs += 1
        if signs > 4:
            raise malformed("a sign is repeated too often", line=self._next.line, expected="at most four !")
        found = self._member()
        if signs:
            self._require(BOOL, found)
        return found

    def _member(self) -> Type:
        found = self._primary()
        while self._takes("."):
            name = self._take()
            if name.kind is not Kind.WORD:
                raise malformed("an attribute is a word", line=name.line, got=name.text)
            found = self._method(found, name) if self._takes("(") else self._attribute(found, name)
        return found

    def _attribute(self, of: Type, name: Token) -> Type:
        known = ATTRIBUTES.get(of, {})
        if name.text not in known:
            raise self._mistyped("there is no such attribute", f"{of}: {', '.join(known) or 'none'}", name.text)
        return known[name.text]

    def _method(self, of: Type, name: Token) -> Type:
        if name.text not in _SET_METHODS or not of.startswith("Set<"):
            raise self._mistyped("there is no such method", f"{', '.join(_SET_METHODS)} of a set", f"{of}.{name.text}")
        self._require(of[4:-1] if name.text == "contains" else of, self._expression())
        self._expect(")")
        return BOOL

    def _primary(self) -> Type:
        token = self._next
        if token.kind is Kind.STRING:
            self._string(wildcards=False)
            return STRING
        if token.kind is Kind.NUMBER:
            return self._long(self._take())
        if token.text in _WORDS:
            return _WORDS[self._take().text]
        if token.text == NAMESPACE:
            return self._literal_entity()
        return self._bracketed(token)

    def _bracketed(self, token: Token) -> Type:
        if self._takes("("):
            found = self._expression()
            self._expect(")")
            return found
        if self._takes("["):
            return self._set()
        raise malformed("a value is expected", line=token.line, got=token.text or "the end")

    def _literal_entity(self) -> Type:
        kind = self._tokens[min(self._at + 2, len(self._tokens) - 1)].text
        if kind not in ENTITIES:
            raise malformed("there is no such type", line=self._next.line, expected=" or ".join(ENTITIES), got=kind)
        return self._entity(kind)

    def _set(self) -> Type:
        first = self._expression()
        if first not in (BOOL, LONG, STRING):
            raise self._mistyped("a set cannot hold this", "Bool, Long or String", first)
        count = 1
        while self._takes(","):
            self._require(first, self._expression())
            count += 1
            if count > MAX_ELEMENTS:
                raise malformed("a set is too large", line=self._next.line, expected=f"<= {MAX_ELEMENTS} elements")
        self._expect("]")
        return f"Set<{first}>"

    # Tokens ----------------------------------------------------------------------------------------------------------

    @property
    def _next(self) -> Token:
        return self._tokens[self._at]

    def _take(self) -> Token:
        found = self._tokens[self._at]
        if found.kind is Kind.END:
            raise malformed("they end too early", line=found.line)
        self._at += 1
        return found

    def _takes(self, text: str) -> bool:
        """Whether this comes next; if so, it is passed."""
        found = self._tokens[self._at]
        if found.text != text or found.kind not in _WORDS_AND_SIGNS:
            return False
        self._at += 1
        return True

    def _expect(self, text: str) -> None:
        if not self._takes(text):
            raise malformed(
                "something else is expected", line=self._next.line, expected=text, got=self._next.text or "the end"
            )

    def _one_of(self, *words: str) -> str:
        found = self._take()
        if found.kind is not Kind.WORD or found.text not in words:
            raise malformed("something else is expected", line=found.line, expected=" or ".join(words), got=found.text)
        return found.text

    def _string(self, *, wildcards: bool) -> str:
        token = self._take()
        if token.kind is not Kind.STRING:
            raise malformed("a text in quotes is expected", line=token.line, got=token.text)
        text = token.text[1:-1]
        if not wildcards and "\\*" in text.replace("\\\\", ""):
            raise malformed("an escaped * stands in patterns only", line=token.line, got=token.text)
        return text

    @staticmethod
    def _long(token: Token) -> Type:
        if int(token.text) > MAX_LONG:
            raise malformed("a number is too large", line=token.line, expected=f"<= {MAX_LONG}", got=token.text)
        return LONG

    def _require(self, expected: Type, got: Type) -> None:
        if expected != got:
            raise self._mistyped("a value has the wrong type", expected, got)

    def _mistyped(self, why: str, expected: str, got: str) -> Malformed:
        return Malformed(
            "conditions.type",
            f"the conditions make no sense: {why}",
            expected=expected,
            got=f"line {self._next.line}: {got}",
            remedy="docs/spec/contract-conditions.md lists attributes and their types",
        )


def cedar_schema() -> dict[str, object]:
    """The same schema as the Cedar engine takes it (JSON schema format), for evaluation and for tests."""
    types = {
        kind: {"shape": {"type": "Record", "attributes": {name: _cedar(type_) for name, type_ in ATTRIBUTES[kind].items()}}}
        for kind in ENTITIES
    }
    session = {"type": "Record", "attributes": {name: _cedar(type_) for name, type_ in ATTRIBUTES["Session"].items()}}
    applies = {"principalTypes": ["Device"], "resourceTypes": ["Service"], "context": session}
    return {NAMESPACE: {"entityTypes": types, "actions": {ACTION: {"appliesTo": applies}}}}


def _cedar(kind: Type) -> dict[str, object]:
    if kind.startswith("Set<"):
        return {"type": "Set", "element": _cedar(kind[4:-1])}
    return {"type": {BOOL: "Boolean", LONG: "Long", STRING: "String"}[kind]}
