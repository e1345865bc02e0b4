"""The secure log: entries, hash chain, RFC 6962 trees and proofs. Pure."""
