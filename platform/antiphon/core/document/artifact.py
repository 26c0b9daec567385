"""``ModelArtifact``: weights in a cluster's storage, their source and what they must hash to (control speed).

Must not know: how they are downloaded.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from antiphon.core.document.part import LINE_REST, Line, Metadata, Model, OneLine
from antiphon.core.document.policies import SecretName
from antiphon.core.document.pools import Quantity
from antiphon.core.text.addresses import check_address

StoreAddress = Annotated[str, Field(pattern=f"^https?://{LINE_REST}$"), OneLine]
ARTIFACT_SCHEMES = ("hf", "s3", "file", "pvc")


class ArtifactStorage(Model):
    """The PersistentVolumeClaim that holds the weights."""

    claim_name: SecretName | None = Field(
        default=None, description="An existing claim to use; None = one of our own, named as the artifact."
    )
    size: Quantity = Field(default="100Gi", description="Size of our own claim.")
    storage_class_name: SecretName | None = Field(default=None, description="Storage class of our own claim; None = the default.")
    access_mode: Literal["ReadWriteOnce", "ReadWriteMany", "ReadOnlyMany"] = Field(
        default="ReadWriteMany", description="Access mode of our own claim; more than one node reads weights."
    )


class ModelArtifactSpec(Model):
    """Where weights come from and where they are kept."""

    uri: Annotated[str, OneLine] = Field(
        description="hf://organisation/name, s3://bucket/prefix, file:///path on the download pod, "
        "or pvc://claim/path (used in place).",
        pattern=f"^(hf|s3|file|pvc)://{LINE_REST}$",
        max_length=1024,
    )
    revision: Line | None = Field(default=None, description="Revision of the source; None = its default.", max_length=128)
    digest: str | None = Field(
        default=None,
        description="sha256:… over the sorted list of files and their hashes; None = recorded, not checked.",
        pattern=r"^sha256:[0-9a-f]{64}$",
    )
    storage: ArtifactStorage = Field(default_factory=ArtifactStorage, description="Where the weights are kept.")
    image: Line | None = Field(
        default=None,
        description="Image of the download Job; None = the operator's default.",
        min_length=1,
        max_length=512,
    )
    credentials_secret: SecretName | None = Field(
        default=None,
        description="Secret whose keys become environment variables of the download (HF_TOKEN, AWS_ACCESS_KEY_ID, …).",
    )
    endpoint_url: StoreAddress | None = Field(
        default=None, description="http:// or https:// address of an S3-compatible store; None = AWS.", max_length=1024
    )
    retries: int = Field(default=3, ge=0, le=20, description="How often a failed download is tried again.")
    deadline_s: int = Field(default=21_600, ge=60, le=604_800, description="A download that takes longer has failed.")

    @property
    def scheme(self) -> str:
        """The uri's scheme, one of ARTIFACT_SCHEMES."""
        return self.uri.partition("://")[0]

    @field_validator("endpoint_url")
    @classmethod
    def _is_a_store(cls, url: str | None) -> str | None:
        if url is not None:
            check_address(url)
        return url

    @model_validator(mode="after")
    def _in_place_needs_no_storage(self) -> ModelArtifactSpec:
        if self.scheme == "pvc" and self.storage.claim_name is not None:
            raise ValueError("storage.claimName: a pvc:// uri is used in place; leave storage out")
        return self


class ModelArtifact(Model):
    """The whole document."""

    api_version: Literal["serving.antiphon.dev/v1alpha1"] = Field(description="Group and version of the kind.")
    kind: Literal["ModelArtifact"] = Field(description="The kind.")
    metadata: Metadata = Field(description="Name, namespace, labels and annotations.", strict=False)
    spec: ModelArtifactSpec = Field(description="Where weights come from and where they are kept.")
