{{- define "antiphon.name" -}}
{{- if contains "antiphon" .Release.Name -}}{{ .Release.Name | trunc 50 | trimSuffix "-" }}{{- else -}}{{ printf "%s-antiphon" .Release.Name | trunc 50 | trimSuffix "-" }}{{- end -}}
{{- end }}

{{- define "antiphon.selector" -}}
app.kubernetes.io/name: antiphon-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "antiphon.labels" -}}
{{ include "antiphon.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "antiphon.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}{{ default (include "antiphon.name" .) .Values.serviceAccount.name }}{{ else }}{{ default "default" .Values.serviceAccount.name }}{{ end -}}
{{- end }}

{{- define "antiphon.image" -}}
{{- if .Values.image.digest }}{{ .Values.image.repository }}@{{ .Values.image.digest }}{{ else }}{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}{{ end -}}
{{- end }}

{{- /* What the operator calls, and nothing else; a test compares it with what the scenarios record. */ -}}
{{- define "antiphon.rules" -}}
- apiGroups: [serving.antiphon.dev]
  resources: [llmdeployments, compositionsofexperts]
  verbs: [get, list, watch]
- apiGroups: [serving.antiphon.dev]
  resources: [modelartifacts]
  verbs: [get, list, watch, patch]
- apiGroups: [serving.antiphon.dev]
  resources: [servingpools]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [serving.antiphon.dev]
  resources: [llmdeployments/status, compositionsofexperts/status, modelartifacts/status, servingpools/status]
  verbs: [patch]
# Owner references that block deletion need this where the admission plugin for it is on.
- apiGroups: [serving.antiphon.dev]
  resources: [llmdeployments/finalizers, compositionsofexperts/finalizers, modelartifacts/finalizers]
  verbs: [update]
- apiGroups: [ray.io]
  resources: [rayservices]
  verbs: [get, list, watch, create, patch]
- apiGroups: [ray.io]
  resources: [rayclusters]
  verbs: [list, patch, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch]
- apiGroups: [""]
  resources: [services]
  verbs: [get, list, create, patch, delete]
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get, create, patch]
- apiGroups: [""]
  resources: [persistentvolumeclaims]
  verbs: [get, create, patch]
- apiGroups: [""]
  resources: [events]
  verbs: [create, patch]
- apiGroups: [apps]
  resources: [deployments]
  verbs: [get, create, patch]
- apiGroups: [apps]
  resources: [controllerrevisions]
  verbs: [get, list, create, patch, delete]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, create, patch]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, list, create, patch, delete]
- apiGroups: [gateway.networking.k8s.io]
  resources: [httproutes]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [inference.networking.k8s.io]
  resources: [inferencepools]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, list, create, patch, delete]
{{- end }}
